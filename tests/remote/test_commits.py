"""Steps in an object store: committed or not there, whoever dies or lingers."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfra
from jaxinfra.checkpoint import checking, commits, integrity, lifecycle, restore, store
from jaxinfra.checkpoint.commits import CheckpointError, NoUsableCheckpoint, SaveError
from jaxinfra.remote import object_path

METADATA = {"config": {}, "data": {}}


@pytest.fixture
def folder(bucket):
    return commits.place(bucket / "checkpoints")


def saver(folder, attempt=1, **options):
    options = {"keep": 2, "run_id": "r", "attempt": attempt} | options
    return lifecycle.Checkpointer(folder, **options)


def save(checkpointer, step, value=None):
    x = jnp.full(5, step if value is None else value)
    checkpointer.save(step, {"x": x}, metadata=METADATA)
    return checkpointer.wait()


def restored(folder):
    abstract = {"x": jaxinfra.restore_part(folder, "x", sharding=_place()).arrays["x"]}
    return restore.restore_latest(folder, abstract)


def _place():
    import jax

    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_steps_are_saved_kept_and_read_back(folder):
    saves = saver(folder)
    for step in (5, 10, 20, 100):
        assert [report.step for report in save(saves, step)] == [step]
    assert names(folder) == ["100", "20"]
    found = restored(folder)
    assert found.step == 100
    np.testing.assert_array_equal(found.arrays["x"], np.full(5, 100))
    assert checking.validate(folder / "20") == []
    assert restore.latest(str(folder)) == 100


def test_a_step_saved_again_stands_beside_the_old_one_until_it_is_in(folder):
    saves = saver(folder)
    save(saves, 4)
    chunk = folder / "4/arrays/x/c/0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    with pytest.raises(NoUsableCheckpoint, match="x/c/0"):
        restore.restore_latest(folder, {"x": jnp.zeros(5, int)})
    save(saves, 4)
    assert names(folder) == ["4.1"]
    assert restored(folder).rejected == ()


@pytest.mark.parametrize("lost", ["x/c/0", "manifest.json"])
def test_what_is_lost_or_damaged_is_named_and_walked_back_from(lost, folder):
    saves = saver(folder)
    for step in (1, 2):
        save(saves, step)
    [key] = [key for key in (folder / "2").below() if key.endswith(lost)]
    (folder / "2" / key).unlink()
    if lost == "manifest.json":  # a step without it was never committed
        assert restored(folder).step == 1
        return
    with pytest.raises(CheckpointError, match="No such object"):
        checking.check_sizes(folder / "2", checking.load(folder / "2"))
    found = restore.restore_latest(folder, restored_abstract())
    assert (found.step, found.rejected[0][0]) == (1, 2)


def restored_abstract():
    import jax

    return {"x": jax.ShapeDtypeStruct((5,), jnp.int32, sharding=_place())}


KILLS = [
    ("commits", "begin", 10),
    ("store", "write_arrays", 10),
    ("store", "describe_arrays", 10),
    ("commits", "commit", 20),
]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(("module", "function", "latest"), KILLS)
def test_a_save_killed_at_any_point_leaves_the_previous_or_the_new_step(
    module, function, latest, folder, monkeypatch
):
    saves = saver(folder)
    save(saves, 10)
    home = {"commits": commits, "store": store}[module]
    plain = getattr(home, function)

    def killed(*args, **kwargs):
        plain(*args, **kwargs)
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(home, function, killed)
        patch.setattr(commits, "abandon", lambda writing: None)
        with pytest.raises(_Killed):
            save(saves, 20)
    assert restored(folder).step == latest
    commits.fence_off(folder, attempt=2)
    saves = saver(folder, attempt=2)
    assert [report.step for report in save(saves, 20, value=7)] == [20]
    assert int(restored(folder).arrays["x"][0]) == 7


def test_a_fenced_writer_cannot_commit_and_its_late_chunks_do_no_harm(
    folder, monkeypatch
):
    old, new = saver(folder, attempt=1), saver(folder, attempt=2)
    save(old, 10)
    plain = integrity.build

    def taken_over(manifest):  # between the old job's chunks and its commit
        if manifest.attempt == 1:
            commits.fence_off(folder, attempt=2)
            save(new, 20, value=2)
        return plain(manifest)

    monkeypatch.setattr(integrity, "build", taken_over)
    with pytest.raises(SaveError, match="fenced off: a later run has the folder"):
        save(old, 20, value=1)
    found = restored(folder)
    assert (found.step, found.metadata["attempt"]) == (20, 2)
    assert int(found.arrays["x"][0]) == 2
    assert checking.validate(folder / "20.1") == []
    save(new, 30)
    assert "20" not in [path.name for _, path in commits.step_folders(folder)]


def test_a_take_over_killed_at_its_fence_is_ended_by_the_next(folder, monkeypatch):
    save(saver(folder), 10)
    commits.begin(folder, step=20, attempt=1)
    (folder / "20/arrays/x/c/0").write_bytes(b"some")

    def killed(self, data):
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(object_path.ObjectPath, "write_bytes", killed)
        with pytest.raises(_Killed):
            commits.fence_off(folder, attempt=2)
    commits.fence_off(folder, attempt=3)
    assert [step for step, _ in commits.step_folders(folder)] == [10]
    assert (folder / "20").below() == ["begun.json", "fenced.json", "manifest.json"]


def test_a_chunk_is_held_once_while_its_pieces_become_a_request(folder, monkeypatch):
    pieces = [np.full(1 << 20, value, np.uint8) for value in range(32)]
    peaks = []

    def write(self, data):
        peaks.append(tracemalloc.get_traced_memory()[1])
        assert data == b"".join(bytes(piece) for piece in pieces)

    monkeypatch.setattr(object_path.ObjectPath, "write_bytes", write)
    tracemalloc.start()
    try:
        commits.write_synced(folder / "chunk", iter(pieces))
    finally:
        tracemalloc.stop()
    assert peaks[0] < 1.25 * (32 << 20)  # it grows by an eighth at a time


def test_a_writer_that_begins_after_the_take_over_is_told_when_it_asks(folder):
    asked = []

    def fence():
        asked.append((folder / "20/begun.json").exists())
        raise RuntimeError("taken over")

    old = saver(folder, fence=fence)
    with pytest.raises(SaveError, match="taken over"):
        save(old, 20)
    assert asked == [True], "it must be seen before it asks"
    commits.fence_off(folder, attempt=2)
    assert commits.step_folders(folder) == []
