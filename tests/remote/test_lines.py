"""JSON lines in parts: all lines once, in order, through failures and take-overs."""

import dataclasses
import json

import pytest

import jaxinfra
from jaxinfra import runfolder
from jaxinfra.config import DataError
from jaxinfra.remote import lines
from jaxinfra.remote.object_path import ObjectPath
from jaxinfra.resilience import ownership

HERE = ownership.this_process()
ELSEWHERE = dataclasses.replace(HERE, host="other", boot_id="another")


def take(bucket, attempt, who=HERE):
    """The run folder, as `acquire_object` does."""
    record = json.dumps(dataclasses.asdict(who) | {"attempt": attempt})
    (bucket / f"owner.{attempt}.json").write_bytes(record.encode())


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


def test_of_two_runs_that_write_the_same_part_the_owner_goes_on(bucket):
    path = bucket / "events.jsonl"
    take(bucket, 1)
    fenced, owner = lines.JsonParts(path), lines.JsonParts(path)
    write(fenced, 1)
    write(owner, 2)
    take(bucket, 2, ELSEWHERE)
    with pytest.raises(lines.PartTaken, match="another run writes here"):
        write(fenced, 3)
    assert steps(path) == [1, 2]


def test_the_last_lines_of_a_fenced_run_are_dropped_and_hinder_no_other(
    bucket, monkeypatch
):
    path = bucket / "events.jsonl"
    take(bucket, 1)
    old = lines.JsonParts(path)
    write(old, 1)
    take(bucket, 2, ELSEWHERE)
    new = lines.JsonParts(path)
    old.write({"step": 2})
    old.close()  # says so, and hides no other error
    assert steps(path) == [1]
    monkeypatch.setattr(ownership, "this_process", lambda: ELSEWHERE)
    write(new, 3)
    assert steps(path) == [1, 3]


def test_what_former_owners_send_after_their_steps_were_undone_comes_too_late(bucket):
    path = bucket / "metrics.jsonl"
    take(bucket, 1)
    first, second = lines.JsonParts(path), lines.JsonParts(path)
    write(second, 1, 2)
    write(second, 3, 4)
    take(bucket, 3, ELSEWHERE)
    assert lines.rewind_parts(bucket, 0) == 4
    for former in (first, second):
        with pytest.raises(lines.PartTaken):
            write(former, 5)
    assert steps(path) == []


def test_a_store_that_is_gone_at_the_end_is_an_error_of_the_disk(bucket, monkeypatch):
    take(bucket, 1)
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
    plain = ObjectPath.write_bytes

    def crash(self, data):
        if len(calls) == 2:  # after the lost lines and the last part
            raise KeyboardInterrupt
        calls.append(self.name)
        plain(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectPath, "write_bytes", crash)
        with pytest.raises(KeyboardInterrupt):
            lines.rewind_parts(bucket, 1)
    assert calls == ["metrics.lost.00000001.jsonl", "metrics.00000003.jsonl"]
    found = {*steps(path), *steps(bucket / "metrics.lost.jsonl")}
    assert found == {1, 2, 3, 4, 5, 6}
    lines.rewind_parts(bucket, 1)
    assert steps(path) == [1]
