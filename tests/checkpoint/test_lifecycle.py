"""Saves behind the loop: what was there at the call is stored, failures are told."""

import subprocess
import sys
import time

import jax
import pytest
import small_state

from jaxinfra.checkpoint import checking, commits, integrity, lifecycle, restore, store
from jaxinfra.checkpoint.commits import NoUsableCheckpoint, SaveError

NAN = float("nan")
# (module, function) after which, or before which, a save is killed -> latest step.
KILLS = [
    ("commits.begin", "after", 10),
    ("store.write_arrays", "before", 10),
    ("store.write_arrays", "after", 10),
    ("store.describe_arrays", "after", 10),
    ("integrity.build", "after", 10),
    ("commits.commit", "before", 10),
    ("commits.commit", "after", 20),
    ("commits.prune", "after", 20),
    ("commits.os.rename", "before", 10),
    ("commits.shutil.rmtree", "before", 20),
]
KILLED = """
import os, pathlib, sys
import jax.numpy as jnp
from jaxinfra.checkpoint import lifecycle

folder, place, when = sys.argv[1:]
saves = lifecycle.Checkpointer(folder, keep=1, run_id="r", attempt=1)
save = lambda step: saves.save(
    step, {"x": jnp.full(5, step)}, metadata={"config": {}, "data": {}})
save(10)
saves.wait()
*modules, name = place.split(".")
module = lifecycle
for part in modules:
    module = getattr(module, part)
plain = getattr(module, name)

def killed(*args, **kwargs):
    if when == "after":
        plain(*args, **kwargs)
    os._exit(9)

setattr(module, name, killed)
save(20)
saves.wait()
"""


def restored(folder, arrays):
    return restore.restore_latest(
        folder, small_state.abstract_of(arrays), logical_shapes=small_state.LOGICAL
    )


def test_a_save_donated_at_once_keeps_the_bits_from_before(
    state, checkpointer, tmp_path
):
    step = jax.jit(
        lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0
    )
    now = state
    for number in (1, 2, 3):
        wanted = {name: jax.numpy.array(array) for name, array in now.items()}
        wanted = {name: jax.device_get(array) for name, array in wanted.items()}
        checkpointer.save(
            number,
            now,
            metadata=small_state.METADATA,
            logical_shapes=small_state.LOGICAL,
        )
        now = step(now)
        jax.block_until_ready(now)
        checkpointer.wait()
        wanted["params/embedding"] = wanted["params/embedding"][:257]
        found = restored(tmp_path / "checkpoints", now)
        assert found.step == number
        small_state.assert_same_bits(found.arrays, wanted)


def test_save_returns_while_the_disk_is_slow(state, checkpointer, monkeypatch):
    write = store.write_arrays

    def slow(*args):
        time.sleep(0.5)
        return write(*args)

    monkeypatch.setattr(store, "write_arrays", slow)
    metadata = {"config": {"a": [1]}, "data": {}}
    started = time.monotonic()
    checkpointer.save(1, state, metadata=metadata, logical_shapes=small_state.LOGICAL)
    assert time.monotonic() - started < 0.4
    assert checkpointer.poll() == []
    (report,) = checkpointer.wait()
    assert (report.step, report.unpruned) == (1, None)
    assert report.blocked_secs < 0.4 < report.secs
    assert report.bytes > 257 * 6 * 4


def test_a_failed_save_is_raised_by_the_next_poll_and_later_saves_go_on(
    state, checkpointer, tmp_path, monkeypatch
):
    small_state.save_now(checkpointer, 1, state)
    with monkeypatch.context() as patch:

        def full(*args):
            raise OSError(28, "No space left on device")

        patch.setattr(store, "write_arrays", full)
        with pytest.raises(SaveError, match=r"save of step 2 failed.*No space left"):
            small_state.save_now(checkpointer, 2, state)
    assert commits.step_folders(tmp_path / "checkpoints")[0][0] == 1
    assert small_state.save_now(checkpointer, 3, state)[0].step == 3
    assert checkpointer.poll() == []


def test_a_failure_does_not_prevent_a_save_that_nobody_polled_before(
    state, checkpointer, tmp_path, monkeypatch
):
    kwargs = {
        "metadata": small_state.METADATA,
        "logical_shapes": small_state.LOGICAL,
    }
    tmp_path.joinpath("checkpoints").write_text("a file where the folder should be")
    checkpointer.save(1, state, **kwargs)
    with pytest.raises(SaveError, match="step 1"):
        checkpointer.wait()
    checkpointer.save(2, state, **kwargs)
    while not checkpointer._pending[0].done():
        time.sleep(0.01)
    tmp_path.joinpath("checkpoints").unlink()
    checkpointer.save(3, state, **kwargs)
    with pytest.raises(SaveError, match="step 2"):
        checkpointer.close()
    assert restore.latest(tmp_path / "checkpoints") == 3


def test_the_newest_steps_are_kept(state, checkpointer, tmp_path):
    for step in (5, 10, 20, 100):
        small_state.save_now(checkpointer, step, state)
    steps = commits.step_folders(tmp_path / "checkpoints")
    assert [step for step, _ in steps] == [100, 20]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "100",
        "20",
    ]


def test_a_step_saved_again_replaces_a_damaged_one(state, checkpointer, tmp_path):
    for step in (1, 2):
        small_state.save_now(checkpointer, step, state)
    (tmp_path / "checkpoints/2/arrays/opt/nu/c/0").write_bytes(b"")
    found = restored(tmp_path / "checkpoints", state)
    assert found.step == 1
    assert found.rejected[0][0] == 2
    assert "arrays/opt/nu/c/0" in found.rejected[0][1]
    small_state.save_now(checkpointer, 2, state)
    assert restored(tmp_path / "checkpoints", state).rejected == ()
    assert checking.validate(tmp_path / "checkpoints/2") == []


def test_a_step_set_aside_counts_until_the_new_one_is_in(state, checkpointer, tmp_path):
    small_state.save_now(checkpointer, 4, state)
    folder = tmp_path / "checkpoints"
    (folder / "4").rename(folder / "4.replaced")
    assert restored(folder, state).step == 4
    small_state.save_now(checkpointer, 4, state)
    assert [path.name for path in folder.iterdir()] == ["4"]


def test_when_all_steps_are_bad_nothing_is_started(state, checkpointer, tmp_path):
    folder = tmp_path / "checkpoints"
    assert restored(folder, state) is None
    assert restore.latest(folder) is None
    for step in (1, 2):
        small_state.save_now(checkpointer, step, state)
    (folder / "1/manifest.json").unlink()
    (folder / "2/manifest.json").write_bytes(b"{}")
    for find in (lambda: restored(folder, state), lambda: restore.latest(folder)):
        with pytest.raises(NoUsableCheckpoint, match=r"(?s)step 2: .*step 1: .*"):
            find()


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"config": {}},
        {"config": {}, "data": []},
        {"config": {}, "data": {"x": NAN}},
    ],
)
def test_metadata_that_is_not_json_is_refused_at_once(metadata, state, checkpointer):
    with pytest.raises(ValueError, match=r"must be dicts|not JSON"):
        checkpointer.save(1, state, metadata=metadata)
    assert checkpointer.wait() == []


def test_a_fenced_writer_cannot_commit(state, tmp_path):
    calls = []

    def fence():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("taken over")

    saves = lifecycle.Checkpointer(tmp_path, keep=1, run_id="r", attempt=1, fence=fence)
    with pytest.raises(SaveError, match="taken over"):
        small_state.save_now(saves, 1, state)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_was_taken_over_in_mid_save_cannot_commit(
    state, tmp_path, monkeypatch
):
    old = lifecycle.Checkpointer(tmp_path, keep=2, run_id="r", attempt=1)
    new = lifecycle.Checkpointer(tmp_path, keep=2, run_id="r", attempt=2)
    small_state.save_now(old, 10, state)
    plain = integrity.build

    def taken_over(manifest):  # after the old job's last look at who owns the run
        if manifest.attempt == 1:
            commits.fence_off(tmp_path, attempt=2)
            small_state.save_now(new, 20, state)
        return plain(manifest)

    monkeypatch.setattr(integrity, "build", taken_over)
    with pytest.raises(SaveError, match="No such file"):
        small_state.save_now(old, 30, state)
    found = restored(tmp_path, state)
    assert (found.step, found.metadata["attempt"]) == (20, 2)
    assert [step for step, _ in commits.step_folders(tmp_path)] == [20, 10]


@pytest.mark.parametrize(("place", "when", "latest"), KILLS)
def test_a_killed_save_leaves_the_previous_or_the_new_step(
    place, when, latest, tmp_path
):
    command = [sys.executable, "-c", KILLED, str(tmp_path), place, when]
    done = subprocess.run(command, cwd=small_state.ROOT, check=False)
    assert done.returncode == 9
    assert restore.latest(tmp_path) == latest
    assert checking.validate(tmp_path / str(latest)) == []
    saves = lifecycle.Checkpointer(tmp_path, keep=1, run_id="r", attempt=2)
    saves.save(30, {"x": jax.numpy.zeros(3)}, metadata=small_state.METADATA)
    saves.close()
    assert [path.name for path in tmp_path.iterdir()] == ["30"]


def test_a_failed_save_whose_space_cannot_be_freed_is_told_as_failed(
    state, checkpointer, monkeypatch
):
    def failing(*args, **kwargs):
        raise OSError(5, "Input/output error")  # as rmtree does of a failing close

    monkeypatch.setattr(store, "write_arrays", failing)
    monkeypatch.setattr(commits.shutil, "rmtree", failing)
    with pytest.raises(SaveError, match="save of step 1 failed"):
        small_state.save_now(checkpointer, 1, state)


def test_what_fails_after_the_commit_leaves_the_step(state, tmp_path, monkeypatch):
    """An object store's place to write in is the step itself: it is not abandoned."""
    saves = lifecycle.Checkpointer(tmp_path, keep=1, run_id="r", attempt=1)
    small_state.save_now(saves, 10, state)
    abandoned = []
    monkeypatch.setattr(commits, "abandon", abandoned.append)

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(lifecycle.jaxinfra, "read_back", fail)
    with pytest.raises(SaveError, match="Input/output error"):
        small_state.save_now(saves, 20, state)
    assert abandoned == []
    assert [step for step, _ in commits.step_folders(tmp_path)] == [20, 10]


def test_who_was_fenced_after_the_commit_deletes_nothing(state, tmp_path, monkeypatch):
    is_fenced = []

    def fence():
        if is_fenced:
            raise RuntimeError("taken over")

    commit = commits.commit
    saves = lifecycle.Checkpointer(tmp_path, keep=1, run_id="r", attempt=1, fence=fence)
    small_state.save_now(saves, 10, state)

    def fenced_then(*args, **kwargs):
        is_fenced.append(True)
        return commit(*args, **kwargs)

    monkeypatch.setattr(commits, "commit", fenced_then)
    [report] = small_state.save_now(saves, 20, state)
    assert "taken over" in report.unpruned
    assert [step for step, _ in commits.step_folders(tmp_path)] == [20, 10]


def test_lines_of_a_fenced_writer_are_not_synced(state, tmp_path):
    synced = []

    def fence():
        if len(calls := fence.calls) > 1:
            raise RuntimeError("taken over")
        calls.append(1)

    fence.calls = [1]
    saves = lifecycle.Checkpointer(
        tmp_path,
        keep=1,
        run_id="r",
        attempt=1,
        fence=fence,
        ready=lambda: synced.append(1),
    )
    with pytest.raises(SaveError, match="taken over") as error:
        small_state.save_now(saves, 1, state)
    assert error.value.kind == "RuntimeError"
    assert synced == []


def test_a_folder_made_again_by_a_late_chunk_is_fenced_off_again(tmp_path):
    (tmp_path / "20.1.writing.deleting").mkdir()
    (tmp_path / "20.1.writing.deleting" / "chunk").touch()
    for attempt in (2, 3):
        (tmp_path / "20.1.writing").mkdir()
        (tmp_path / "20.1.writing" / "late").touch()
        commits.fence_off(tmp_path, attempt=attempt)
        assert not (tmp_path / "20.1.writing").exists()


def test_a_folder_that_cannot_be_listed_is_no_synced_one(tmp_path, monkeypatch):
    (tmp_path / "arrays").mkdir()
    scandir = commits.os.scandir

    def fail(path):
        if str(path).endswith("arrays"):
            raise OSError(5, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(commits.os, "scandir", fail)
    with pytest.raises(OSError, match="Input/output"):
        commits.sync_folders(tmp_path)
