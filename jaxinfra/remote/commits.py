"""`checkpoint.commits` for object stores, where nothing can be renamed.

    20/begun.json      the attempt that writes here; created, so of one alone
    20/arrays/...      its chunks
    20/manifest.json   created last: from here on the step is committed
    20.1/...           the same step, saved again

Who takes a run over creates the manifests that earlier attempts have not written yet:
of two that create a key one succeeds, so a save is committed before the take-over, and
is seen by it, or never. A save marks its place before it asks whether it still owns the
run, and a take-over owns the run before it looks for marks: none slips through.
"""

import io
import json
import uuid
from collections.abc import Iterable
from typing import Any

import xxhash

from jaxinfra.checkpoint import checking, commits
from jaxinfra.checkpoint.commits import CheckpointError, SaveError
from jaxinfra.checkpoint.integrity import FileRecord, Manifest
from jaxinfra.config import DataError
from jaxinfra.remote.object_path import ObjectPath

_BEGUN, _FENCED = "begun.json", "fenced.json"
_FENCE = b'{"fenced_by"'  # how a manifest begins that is none


def object_folder(folder: str | ObjectPath) -> ObjectPath:
    """A folder of an object store, which the functions of `commits` take from now on:
    loading this module is what registers them."""
    return folder if isinstance(folder, ObjectPath) else ObjectPath(folder)


def _by_name(folder: ObjectPath) -> dict[str, set[str]]:
    """Name of a step's folder -> the keys below it."""
    found: dict[str, set[str]] = {}
    for key in folder.below():
        name, _, rest = key.partition("/")
        if _step(name):
            found.setdefault(name, set()).add(rest)
    return found


def _step(name: str) -> tuple[int, int] | None:
    """(step, which of its saves) of a folder's name; None for others."""
    parts = name.split(".")
    is_step = len(parts) <= 2 and all(part.isdecimal() for part in parts)
    return (int(parts[0]), int(parts[1]) if len(parts) == 2 else 0) if is_step else None


@commits.step_folders.register
def step_folders(folder: ObjectPath) -> list[tuple[int, ObjectPath]]:
    """Of several saves of a step the last is first."""
    found = [
        (_step(name) or (0, 0), name)
        for name, keys in _by_name(folder).items()
        if commits.MANIFEST in keys and _FENCED not in keys
    ]
    return [(step, folder / name) for (step, _), name in sorted(found, reverse=True)]


@commits.fence_off.register
def fence_off(folder: ObjectPath, *, attempt: int) -> None:
    """Creates the manifests that earlier attempts would, and frees their space."""
    fence = json.dumps({"fenced_by": attempt}).encode()
    for name, keys in _by_name(folder).items():
        if _BEGUN not in keys or _FENCED in keys:
            continue
        manifest = folder / name / commits.MANIFEST
        if commits.MANIFEST in keys:  # perhaps of a take-over that was killed here
            is_fenced = manifest.begins_with(_FENCE)
        else:
            begun = json.loads((folder / name / _BEGUN).read_bytes())
            is_fenced = begun.get("attempt", 0) < attempt and manifest.create(fence)
        if is_fenced:
            (folder / name / _FENCED).write_bytes(fence)
            (folder / name).delete_below("arrays")


@commits.begin.register
def begin(folder: ObjectPath, *, step: int, attempt: int) -> str:
    """Marks the first free name of the step; sweeps what fenced writers wrote late."""
    found = _by_name(folder)
    for name, keys in found.items():
        if _FENCED in keys and any(key.startswith("arrays/") for key in keys):
            (folder / name).delete_below("arrays")
    number = 0
    while True:
        name = f"{step}.{number}" if number else str(step)
        mark = json.dumps({"attempt": attempt, "id": uuid.uuid4().hex}).encode()
        if name not in found and (folder / name / _BEGUN).create(mark):
            return name
        number += 1


@commits.commit.register
def commit(writing: ObjectPath, *, step: int, manifest: bytes) -> ObjectPath:
    """Raises SaveError if a later run has taken the folder over."""
    if not (writing / commits.MANIFEST).create(manifest):
        raise SaveError(f"{writing} was fenced off: a later run has the folder")
    return writing


@commits.abandon.register
def abandon(writing: ObjectPath) -> None:
    """As far as the store can be reached; a manifest goes first, if it is there."""
    commits.prune(writing.parent, [writing.name])


@commits.prune.register
def prune(folder: ObjectPath, names: list[str]) -> str | None:
    """A step without its manifest no longer counts, so that goes first."""
    try:
        for name in names:
            (folder / name / commits.MANIFEST).unlink()
            (folder / name).delete_below()
    except DataError as error:
        return str(error)
    return None


@commits.write_synced.register
def write_synced(path: ObjectPath, pieces: Iterable[Any]) -> None:
    """One request; it is durable when the store has answered."""
    whole = io.BytesIO()  # which gives its bytes without a copy
    for piece in pieces:
        whole.write(piece)
    path.write_bytes(whole.getvalue())


@checking.check_sizes.register
def check_sizes(step_folder: ObjectPath, manifest: Manifest) -> None:
    """Whether every file is there; sizes are compared when they are read."""
    found = set(step_folder.below())
    for record in manifest.files():
        if record.path not in found:
            raise CheckpointError(f"{step_folder / record.path}: No such object")


@checking.read.register
def read(step_folder: ObjectPath, record: FileRecord) -> None:
    """One request, compared and forgotten."""
    _checked(step_folder, record)


@checking.read_into.register
def read_into(step_folder: ObjectPath, record: FileRecord, *buffers) -> None:
    """One request, copied once its digest is right."""
    data, start = memoryview(_checked(step_folder, record)), 0
    for buffer in buffers:
        view = memoryview(buffer)
        view[:] = data[start : start + len(view)]
        start += len(view)


def _checked(step_folder: ObjectPath, record: FileRecord) -> bytes:
    path = step_folder / record.path
    try:
        data = path.read_bytes(record.bytes)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if len(data) != record.bytes:
        raise CheckpointError(
            f"{path}: {len(data)} bytes, {record.bytes} bytes were written"
        )
    if xxhash.xxh3_128_hexdigest(data) != record.xxh3_128:
        raise CheckpointError(f"{path}: its bytes are not those written (xxh3_128)")
    return data
