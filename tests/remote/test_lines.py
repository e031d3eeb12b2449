"""JSON lines in parts: all lines once, in order, through failures and take-overs."""

import json

import pytest

import jaxinfra
from jaxinfra import runfolder
from jaxinfra.config import DataError
from jaxinfra.remote import lines
from jaxinfra.remote.object_path import ObjectPath


def write(journal, *steps):
    for step in steps:
        journal.write({"step": step, "loss": step / 3})
    journal.sync()


def steps(path):
    return [json.loads(line)["step"] for line in lines.read_lines(path)]


def test_a_part_is_written_at_each_sync_and_none_for_nothing(bucket):
    path = bucket / "metrics.jsonl"
    journal = runfolder.json_lines(path)
    assert isinstance(journal, jaxinfra.JsonParts)
    write(journal, 1, 2)
    write(journal)
    write(journal, 3)
    journal.close()
    assert bucket.below() == ["metrics.00000001.jsonl", "metrics.00000002.jsonl"]
    write(lines.JsonParts(path), 4)
    assert steps(path) == [1, 2, 3, 4]


def test_lines_wait_for_the_next_sync_if_one_fails(bucket, monkeypatch):
    path = bucket / "metrics.jsonl"
    journal = lines.JsonParts(path)
    with monkeypatch.context() as patch:

        def fail(self, data):
            raise DataError("out of order")

        patch.setattr(ObjectPath, "create", fail)
        with pytest.raises(DataError):
            write(journal, 1)
    write(journal, 2)
    assert steps(path) == [1, 2]


def test_a_part_whose_answer_was_lost_is_there_once_and_more_lines_follow(
    bucket, monkeypatch
):
    path = bucket / "metrics.jsonl"
    journal = lines.JsonParts(path)
    plain = ObjectPath.create

    def unanswered(self, data):
        plain(self, data)
        raise DataError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectPath, "create", unanswered)
        for step in (1, 2):
            with pytest.raises(DataError, match="no answer"):
                write(journal, step)
    write(journal, 3)
    write(journal, 4)
    assert steps(path) == [1, 2, 3, 4]


def test_two_runs_cannot_write_the_same_part(bucket):
    path = bucket / "events.jsonl"
    old, new = lines.JsonParts(path), lines.JsonParts(path)
    write(new, 1)
    with pytest.raises(DataError, match="another run writes here"):
        write(old, 2)
    assert steps(path) == [1]
    old.close()  # says so, and hides no other error
    assert steps(path) == [1]


def test_a_store_that_is_gone_at_the_end_is_an_error_of_the_disk(bucket, monkeypatch):
    journal = lines.JsonParts(bucket / "events.jsonl")
    journal.write({"step": 1})

    def gone(self, data):
        raise DataError("no answer")

    monkeypatch.setattr(ObjectPath, "create", gone)
    with pytest.raises(OSError, match="no answer") as error:
        journal.close()
    assert error.value.errno == 5


@pytest.mark.parametrize(("step", "num_lost"), [(0, 7), (2, 5), (3, 4), (7, 0), (9, 0)])
def test_undone_steps_move_to_the_lost_ones_and_the_count_goes_on(
    step, num_lost, bucket
):
    path = bucket / "metrics.jsonl"
    journal = lines.JsonParts(path)
    for part in ((1, 2, 3), (4, 5), (6, 7)):
        write(journal, *part)
    assert lines.rewind_parts(bucket, step) == num_lost
    assert steps(path) == list(range(1, min(step, 7) + 1))
    assert steps(bucket / "metrics.lost.jsonl") == list(range(step + 1, 8))
    assert lines.rewind_parts(bucket, step) == 0
    write(lines.JsonParts(path), step + 1)
    assert steps(path)[-1] == step + 1


def test_a_crash_while_steps_are_undone_loses_no_line(bucket, monkeypatch):
    path = bucket / "metrics.jsonl"
    journal = lines.JsonParts(path)
    for part in ((1, 2), (3, 4), (5, 6)):
        write(journal, *part)
    calls = []
    plain = ObjectPath.unlink

    def crash(self, missing_ok=True):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectPath, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            lines.rewind_parts(bucket, 1)
    found = {*steps(path), *steps(bucket / "metrics.lost.jsonl")}
    assert found == {1, 2, 3, 4, 5, 6}
    lines.rewind_parts(bucket, 1)
    assert steps(path) == [1]
