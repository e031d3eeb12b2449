"""Folders of steps: begun as `.writing`, synced, committed by a rename, at last
deleted; and the errors of checkpoints, by name.

| name | meaning |
|---|---|
| `20` | committed; what is wrong with it later is damage |
| `20.3.writing` | being saved by attempt 3, or left by a kill |
| `20.replaced` | the former `20`, while it is saved again; counts where `20` is not |
| `20.deleting` | no longer counts |

A run that takes the folder over (`fence_off`) renames what earlier attempts are still
writing, so their commit finds nothing to rename: of the two renames one wins. These
functions are generic in the kind of folder: here those of POSIX, where a rename is
atomic; `remote.commits` registers those of an object store, which has none.

Imports no jax; `resilience.exitcodes` has the codes of the errors.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import functools
import mmap
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jaxinfra

MANIFEST = "manifest.json"
THREADS = 4  # They wait for the disk; more gained nothing on 2 cores.

# To the disk: what the cores' caches hold, at aligned addresses.
_BLOCK_BYTES, _ALIGNED = 2 << 20, 4096
_DIRECT = getattr(os, "O_DIRECT", 0)

_STEP = re.compile(r"(0|[1-9][0-9]{0,17})(\.replaced)?")
_BEGUN = ".begun"
_WRITING = re.compile(r"[0-9]+\.([0-9]+)\.writing")


class CheckpointError(Exception):
    """A checkpoint is damaged or not there; a restore walks back one step."""


class IncompatibleCheckpoint(CheckpointError):
    """A sound checkpoint of another model, or format: walking back cannot help."""


class NoUsableCheckpoint(CheckpointError):
    """There are checkpoints and none validates: the run must not start at 0."""


class SaveError(Exception):
    """A save behind the training loop failed; every process raises the same text.
    `kind` is the class name of what made it fail."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveReport:
    """A committed save; `blocked_secs` of its `secs` were taken from the caller.

    `bytes` is the whole checkpoint's, in all processes. `unpruned`: why old steps
    could not be deleted, if they could not; the save is good nevertheless.
    """

    step: int
    blocked_secs: float
    secs: float
    bytes: int
    unpruned: str | None = None


def place(folder: Any) -> Any:
    """A path or URL as what these functions know; of an object store, by its public
    name, which loads and registers them."""
    is_local = isinstance(folder, str | os.PathLike) and "://" not in str(folder)
    return pathlib.Path(folder) if is_local else jaxinfra.object_folder(folder)


@functools.singledispatch
def step_folders(folder: Any) -> list[tuple[int, Any]]:
    """Committed steps and where they stand, newest first, damaged ones too."""
    if not folder.is_dir():
        return []
    matches = [_STEP.fullmatch(name) for name in os.listdir(folder)]
    found = [(int(m[1]), m[2] is None, folder / m[0]) for m in matches if m]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


@functools.singledispatch
def fence_off(folder: Any, *, attempt: int) -> None:
    """Takes from attempts before `attempt` what they have not committed."""
    if not folder.is_dir():
        return
    for match in [_WRITING.fullmatch(name) for name in os.listdir(folder)]:
        if match and int(match[1]) < attempt:
            with contextlib.suppress(FileNotFoundError):  # it was quicker
                # By a name of this attempt's: the folder may have been made again.
                aside = f"{match[0]}.{attempt}.deleting"
                os.rename(folder / match[0], folder / aside)


@functools.singledispatch
def begin(folder: Any, *, step: int, attempt: int) -> str:
    """Makes an empty folder to write in, named after its attempt so that a fenced
    writer's late chunks fall into no other's; deletes what killed saves left."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    matches = [_WRITING.fullmatch(name) for name in os.listdir(folder)]
    for match in matches:
        if match and int(match[1]) <= attempt:
            shutil.rmtree(folder / match[0])
    for left in folder.glob("*.deleting"):
        shutil.rmtree(left, ignore_errors=True)  # somebody may still read it
    name = f"{step}.{attempt}.writing"
    (folder / name).mkdir()
    (folder / name / _BEGUN).touch()
    return name


@functools.singledispatch
def commit(writing: Any, *, step: int, manifest: bytes) -> Any:
    """Gives a folder whose files are written its manifest and its step's number,
    durably; returns where it stands now."""
    write_synced(writing / MANIFEST, [manifest])
    os.unlink(writing / _BEGUN)  # not there: fenced off, and made again by a late chunk
    sync_folders(writing)
    final = writing.with_name(str(step))
    if final.exists():
        replaced = final.with_name(f"{step}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(writing, final)
    sync_folder(final.parent)
    return final


@functools.singledispatch
def abandon(writing: Any) -> None:
    """Frees the space of a failed save, as far as that is possible."""
    with contextlib.suppress(OSError):  # rmtree does not ignore a failing close
        shutil.rmtree(writing, ignore_errors=True)


def surplus(
    folder: Any, *, step: int, keep: int, also: Collection[int] = ()
) -> list[str]:
    """Names of steps up to `step` that are neither of the `keep` newest nor in `also`,
    and of what was replaced.

    Steps newer than `step` are of a future that was walked back from: they stay until
    they are saved again.
    """
    kept: set[int] = set()
    names, num_kept = [], 0
    for found, path in step_folders(folder):
        if found > step:
            continue
        if found in kept or (num_kept >= keep and found not in also):
            names.append(path.name)
        else:
            kept.add(found)
            num_kept += 1
    return names


@functools.singledispatch
def prune(folder: Any, names: list[str]) -> str | None:
    """Deletes steps by their names; returns why it could not, which loses nothing."""
    try:
        for name in names:
            os.rename(folder / name, folder / f"{name}.deleting")
        for left in folder.glob("*.deleting"):
            shutil.rmtree(left)
    except OSError as error:
        return str(error)
    return None


@functools.singledispatch
def write_synced(path: Any, pieces: Iterable[Any]) -> None:
    """Writes a file, its bytes given in pieces, down to the disk; its name needs
    `sync_folders`.

    Past the page cache where that can be: nobody reads it soon, and memory is dear.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _set_direct(file, True)
        block, num_bytes = memoryview(mmap.mmap(-1, _BLOCK_BYTES)), 0
        for size in _filled(block, pieces):
            num_bytes += size
            rest = block[: -(-size // _ALIGNED) * _ALIGNED]
            while rest:
                rest = rest[_write_some(file, rest) :]
        os.truncate(file, num_bytes)  # the last block was written whole
        os.fsync(file)
    finally:
        os.close(file)


def _write_some(file: int, data: memoryview) -> int:
    try:
        return os.write(file, data)
    except OSError as error:  # of a file system that is stricter than most, perhaps
        if error.errno != errno.EINVAL or not _set_direct(file, False):
            raise
        return os.write(file, data)


def _set_direct(file: int, is_on: bool) -> bool:
    """Whether that was not so before."""
    now = fcntl.fcntl(file, fcntl.F_GETFL)
    wanted = now | _DIRECT if is_on else now & ~_DIRECT
    with contextlib.suppress(OSError):  # it cannot be
        fcntl.fcntl(file, fcntl.F_SETFL, wanted)
    return wanted != now


def _filled(block: memoryview, pieces: Iterable[Any]) -> Iterator[int]:
    """How many bytes of `block` hold the next of the pieces' bytes; all but the last
    time it is full."""
    size = 0
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        while rest:
            part = rest[: len(block) - size]
            block[size : size + len(part)] = part
            size, rest = size + len(part), rest[len(part) :]
            if size == len(block):
                yield size
                size = 0
    if size:
        yield size


def sync_folders(root: pathlib.Path) -> None:
    """`sync_folder` for a folder and all below it, several at once."""

    def below(folder: Any) -> Iterator[Any]:  # os.walk passes over what it cannot list
        yield folder
        for entry in os.scandir(folder):
            if entry.is_dir():
                yield from below(entry.path)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        collections.deque(pool.map(sync_folder, list(below(root))), maxlen=0)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes the names in a folder durable, as fsync of a file does not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
