"""Lines of a run: written once, whatever the disk refuses for a while."""

import json
import os

import pytest

from jaxinfra import runfolder


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


class _Full:
    """A file that takes some bytes and then no more, until `is_full` is over."""

    def __init__(self, file, room):
        self.file, self.room, self.is_full = file, room, True

    def write(self, data):
        if not self.is_full:
            return self.file.write(data)
        if not self.room:
            raise OSError(28, "No space left on device")
        taken, self.room = data[: self.room], self.room - len(data[: self.room])
        return self.file.write(taken)

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()


@pytest.mark.parametrize("room", [0, 7, 40])
def test_lines_that_a_full_disk_refuses_follow_when_there_is_room(room, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = runfolder.json_lines(path)
    lines.write({"step": 1})
    full = lines._file = _Full(lines._file, room)
    for step in range(2, 8):
        lines.write({"step": step})  # tells nothing: `sync` does
    with pytest.raises(OSError, match="No space"):
        lines.sync()
    full.is_full = False
    lines.write({"step": 8})
    lines.close()
    assert steps(path) == list(range(1, 9))


def test_a_failed_sync_is_told_again_until_one_succeeds(tmp_path, monkeypatch):
    lines = runfolder.json_lines(tmp_path / "x.jsonl")
    lines.write({"step": 1})
    synced = []
    fsync = os.fsync

    def failing(descriptor):
        synced.append(descriptor)
        if len(synced) < 3:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(runfolder.os, "fsync", failing)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            lines.sync()
    lines.sync()
    lines.sync()
    assert len(synced) == 3
    lines.close()


def test_a_line_cut_short_by_a_crash_is_removed_before_the_next(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    lines = runfolder.json_lines(path)
    lines.write({"step": 2})
    lines.close()
    assert steps(path) == [1, 2]
