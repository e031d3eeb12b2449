"""Which steps stay, and that none goes before its successor was read back."""

import json

import jax.numpy as jnp
import pytest

from jaxinfra.checkpoint import (
    checking,
    commits,
    integrity,
    lifecycle,
    read_back,
    restore,
)
from jaxinfra.checkpoint.commits import SaveError
from jaxinfra.checkpoint.retention import make_retain
from jaxinfra.config import CheckpointConfig

# Steps, 100 s apart, and what some of them were evaluated to.
LOSSES = {10: 3.0, 20: None, 30: 1.0, 40: 2.0, 50: None, 60: 5.0, 70: 4.0}
SAVED = {step: 1_000 + 10 * step for step in LOSSES}


def save(checkpointer, step, loss=None):
    metrics = {} if loss is None else {"eval/loss": loss}
    metadata = {"config": {}, "data": {}, "metrics": metrics}
    checkpointer.save(step, {"x": jnp.full(5, step)}, metadata=metadata)
    return checkpointer.wait()


def steps_of(folder):
    return sorted(step for step, _ in commits.step_folders(folder))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [60, 70]),
        ({"keep_every": 20}, [20, 40, 60, 70]),
        ({"keep_best": 2}, [30, 40, 60, 70]),
        ({"keep_best": 1, "best": "highest"}, [60, 70]),
        ({"keep_best": 3, "best_metric": "eval/accuracy"}, [60, 70]),
        ({"keep_hours": 0.1}, [40, 50, 60, 70]),  # 360 s
        ({"keep_hours": 0.05, "keep_every": 30, "keep_best": 1}, [30, 60, 70]),
    ],
)
def test_steps_stay_by_number_result_and_age(settings, kept, tmp_path, monkeypatch):
    settings = CheckpointConfig(keep=2, **settings)
    clock = [0.0]
    monkeypatch.setattr(lifecycle.time, "time", lambda: clock[0])
    checkpointer = lifecycle.Checkpointer(
        tmp_path,
        keep=2,
        run_id="r",
        attempt=1,
        retain=make_retain(settings, now=lambda: clock[0]),
    )
    for step, loss in LOSSES.items():
        clock[0] = SAVED[step]
        save(checkpointer, step, loss)
    assert steps_of(tmp_path) == kept
    checkpointer.close()


def test_nothing_is_deleted_when_the_new_step_does_not_read_back(tmp_path, monkeypatch):
    saves = lifecycle.Checkpointer(tmp_path, keep=1, run_id="r", attempt=1)
    save(saves, 1)
    commit = commits.commit

    def damaged(writing, **about):  # by the disk, after it was written
        chunk = writing / "arrays/x/c/0"
        data = bytearray(chunk.read_bytes())
        data[3] ^= 1
        chunk.write_bytes(data)
        return commit(writing, **about)

    with monkeypatch.context() as patch:
        patch.setattr(commits, "commit", damaged)
        with pytest.raises(SaveError, match=r"step 2.*c/0.*not those written"):
            save(saves, 2)
    assert steps_of(tmp_path) == [1, 2]
    found = restore.latest(tmp_path)  # looks at sizes alone
    assert found == 2
    assert checking.validate(tmp_path / "2")
    assert checking.validate(tmp_path / "1") == []
    save(saves, 3)
    assert steps_of(tmp_path) == [3]
    saves.close()


def test_what_is_kept_is_read_from_manifests_and_a_damaged_one_is_no_candidate(
    tmp_path, monkeypatch
):
    saves = lifecycle.Checkpointer(tmp_path, keep=3, run_id="r", attempt=1)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        save(saves, step, loss)
    (tmp_path / "1/manifest.json").write_text("{}")
    reads = []
    load = checking.load
    monkeypatch.setattr(checking, "load", lambda p: reads.append(p) or load(p))
    retain = make_retain(CheckpointConfig(keep_best=1))
    for _ in range(2):
        assert retain(commits.step_folders(tmp_path)) == {2}
    assert len(reads) == 3
    saves.close()


def test_metrics_and_time_are_in_the_manifest_and_format_1_has_none(tmp_path):
    saves = lifecycle.Checkpointer(tmp_path, keep=3, run_id="r", attempt=1)
    save(saves, 4, 0.25)
    saves.close()
    manifest = checking.load(tmp_path / "4")
    assert manifest.metrics == {"eval/loss": 0.25}
    assert manifest.unix_secs > 1_700_000_000
    values = json.loads((tmp_path / "4/manifest.json").read_text())
    del values["sha256"], values["unix_secs"], values["metrics"]
    first = integrity.parse(integrity.dump(values | {"format_version": 1}))
    assert (first.metrics, first.unix_secs) == ({}, 0)


def test_read_back_names_what_is_not_as_written(tmp_path):
    saves = lifecycle.Checkpointer(tmp_path, keep=3, run_id="r", attempt=1)
    save(saves, 4)
    saves.close()
    record = checking.load(tmp_path / "4").arrays["x"]
    digests = {"x": {chunk.path: chunk.xxh3_128 for chunk in record.chunks}}
    read_back.read_back(tmp_path / "4", digests, {"x": record})
    (tmp_path / "4/arrays/x/c/0").unlink()
    with pytest.raises(commits.CheckpointError, match="x/c/0"):
        read_back.read_back(tmp_path / "4", digests, {"x": record})
