"""JSON lines of a run in parts, one written at each save: `metrics.00000001.jsonl` ...

All parts in the order of their names are the file that a run on disk has. A part is
created, so two runs cannot both write one: the owner of the run goes on with the next
number, another is told by `PartTaken`. Steps are taken back once the next number is
taken, and no number is given up: what a former owner sends late has none left.
"""

import errno
import json
import logging
import re
import threading
from collections.abc import Mapping
from typing import Any

from jaxinfra.config import DataError
from jaxinfra.remote import ownership
from jaxinfra.remote.object_path import ObjectPath
from jaxinfra.runfolder import JsonLines

_LOG = logging.getLogger(__name__)


class PartTaken(DataError):
    """A later run has the folder: no part of this one may follow."""


class JsonParts(JsonLines):
    """As `runfolder.JsonLines`: what was written is in the store after `sync`."""

    def __init__(self, path: ObjectPath):
        self._path, self._lines = path, []
        self._sent = b""  # a part that may be in the store: sent again until answered
        self._lock, self._syncing = threading.Lock(), threading.Lock()
        self._number = _last_number(path) + 1

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
            if self._sent or self._lines:
                self._check_owner()
            self.sync()
        except PartTaken as error:  # what is left is of a future that was undone
            _LOG.warning("%s", error)
        except DataError as error:  # as of a disk: the run ends as one not saved
            raise OSError(errno.EIO, str(error)) from error

    def _send(self) -> None:
        while self._sent:
            if _part(self._path, self._number).create(self._sent):
                self._sent = b""
            else:
                self._check_owner()
            self._number += 1

    def _check_owner(self) -> None:
        if not ownership.is_ours(self._path.parent):
            raise PartTaken(f"no more lines of {self._path}: another run writes here")


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
    metrics, target = run_dir / "metrics.jsonl", run_dir / "metrics.lost.jsonl"
    while not _part(metrics, _last_number(metrics) + 1).create(b""):
        pass  # a former owner was faster
    undone: list[tuple[ObjectPath, list[str], list[str]]] = []
    for part in reversed(parts(metrics)):
        lines = part.read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            undone.insert(0, (part, kept, lines[len(kept) :]))
        elif lines:
            break
    lost = [line for _, _, lines in undone for line in lines]
    if lost:
        part = _part(target, _last_number(target) + 1)
        part.write_bytes("".join(lost).encode())
    for part, kept, _ in reversed(undone):
        part.write_bytes("".join(kept).encode())
    return len(lost)


def _last_number(path: ObjectPath) -> int:
    return max(map(_number, parts(path)), default=0)


def _number(part: ObjectPath) -> int:
    return int(part.name.split(".")[-2])


def _part(path: ObjectPath, number: int) -> ObjectPath:
    stem, _, suffix = path.name.rpartition(".")
    return path.with_name(f"{stem}.{number:08}.{suffix}")
