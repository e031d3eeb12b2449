"""JSON lines of a run in parts, one written at each save: `metrics.00000001.jsonl` ...

All parts in the order of their names are the file that a run on disk has. A part is
created, never changed, so two runs cannot both write one.
"""

import errno
import json
import logging
import re
import threading
from collections.abc import Mapping
from typing import Any

from jaxinfra.config import DataError
from jaxinfra.remote.object_path import ObjectPath
from jaxinfra.runfolder import JsonLines

_LOG = logging.getLogger(__name__)


class PartTaken(DataError):
    """A part is there already: a later run has the folder."""


class JsonParts(JsonLines):
    """As `runfolder.JsonLines`: what was written is in the store after `sync`."""

    def __init__(self, path: ObjectPath):
        self._path, self._lines = path, []
        self._sent = b""  # a part that may be in the store: sent again until answered
        self._lock, self._syncing = threading.Lock(), threading.Lock()
        self._number = max(map(_number, parts(path)), default=0) + 1

    def write(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            self._lines.append(json.dumps(record) + "\n")

    def sync(self) -> None:
        with self._syncing:
            self._send()
            with self._lock:
                self._sent, self._lines = "".join(self._lines).encode(), []
            self._send()

    def close(self) -> None:
        try:
            self.sync()
        except PartTaken as error:  # what is left is of a future that was undone
            _LOG.warning("%s", error)
        except DataError as error:  # as of a disk: the run ends as one not saved
            raise OSError(errno.EIO, str(error)) from error

    def _send(self) -> None:
        if self._sent:
            part = _part(self._path, self._number)
            if not part.create(self._sent):
                raise PartTaken(f"{part} is there: another run writes here")
            self._sent, self._number = b"", self._number + 1


def parts(path: ObjectPath) -> list[ObjectPath]:
    """The parts of a file of lines, in order."""
    stem, _, suffix = path.name.rpartition(".")
    form = re.compile(rf"{re.escape(stem)}\.\d{{8,}}\.{re.escape(suffix)}")
    names = path.parent.below(f"{stem}.")
    found = [path.parent / name for name in names if form.fullmatch(name)]
    return sorted(found, key=_number)


def read_lines(path: ObjectPath) -> list[str]:
    """All lines of all parts, without their ends."""
    return [line for part in parts(path) for line in part.read_text().splitlines()]


def rewind_parts(run_dir: ObjectPath, step: int) -> int:
    """As `resuming.rewind_metrics`: moves lines of steps after `step` to parts of
    metrics.lost.jsonl; returns how many. Each moment in between has every line."""
    undone: list[tuple[ObjectPath, list[str], list[str]]] = []
    for part in reversed(parts(run_dir / "metrics.jsonl")):
        lines = part.read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        if len(kept) == len(lines):
            break
        undone.insert(0, (part, kept, lines[len(kept) :]))
    lost = [line for _, _, lines in undone for line in lines]
    if lost:
        target = run_dir / "metrics.lost.jsonl"
        number = max(map(_number, parts(target)), default=0)
        _part(target, number + 1).write_bytes("".join(lost).encode())
    for part, kept, _ in reversed(undone):
        if kept:
            part.write_bytes("".join(kept).encode())
        else:
            part.unlink()
    return len(lost)


def _number(part: ObjectPath) -> int:
    return int(part.name.split(".")[-2])


def _part(path: ObjectPath, number: int) -> ObjectPath:
    stem, _, suffix = path.name.rpartition(".")
    return path.with_name(f"{stem}.{number:08}.{suffix}")
