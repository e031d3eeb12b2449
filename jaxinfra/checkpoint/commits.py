"""Folders of steps: begun as `.writing`, synced, committed by a rename, at last
deleted; and the errors of checkpoints, by name.

| name | meaning |
|---|---|
| `20` | committed; what is wrong with it later is damage |
| `20.3.writing` | being saved by attempt 3, or left by a kill |
| `20.replaced` | the former `20`, while it is saved again; counts where `20` is not |
| `20.deleting` | no longer counts |

Imports no jax; `resilience.exitcodes` has the codes of the errors. Limits: POSIX
folders, where a rename is atomic; an object store has none and needs a conditional
write of the manifest instead.
"""

import collections
import concurrent.futures
import os
import pathlib
import re
import shutil

THREADS = 4  # They wait for the disk; more gained nothing on 2 cores.

_STEP = re.compile(r"(0|[1-9][0-9]{0,17})(\.replaced)?")
_WRITING = re.compile(r"[0-9]+\.([0-9]+)\.writing")


class CheckpointError(Exception):
    """A checkpoint is damaged or not there; a restore walks back one step."""


class IncompatibleCheckpoint(CheckpointError):
    """A sound checkpoint of another model, or format: walking back cannot help."""


class NoUsableCheckpoint(CheckpointError):
    """There are checkpoints and none validates: the run must not start at 0."""


class SaveError(Exception):
    """A save behind the training loop failed; every process raises the same text."""


def step_folders(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """Committed steps and where they stand, newest first, damaged ones too."""
    if not folder.is_dir():
        return []
    matches = [_STEP.fullmatch(name) for name in os.listdir(folder)]
    found = [(int(m[1]), m[2] is None, folder / m[0]) for m in matches if m]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def writing_folder(folder: pathlib.Path, step: int, attempt: int) -> pathlib.Path:
    """Of one attempt alone: a fenced writer's late chunks fall into no other's."""
    return folder / f"{step}.{attempt}.writing"


def begin(writing: pathlib.Path, *, attempt: int) -> None:
    """Makes an empty folder to write in, and deletes what killed saves left."""
    folder = writing.parent
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    matches = [_WRITING.fullmatch(name) for name in os.listdir(folder)]
    for match in matches:
        if match and int(match[1]) <= attempt:
            shutil.rmtree(folder / match[0])
    writing.mkdir()


def commit(writing: pathlib.Path, *, step: int) -> None:
    """Gives a folder that is whole and synced its step's number, durably."""
    final = writing.with_name(str(step))
    if final.exists():
        replaced = final.with_name(f"{step}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(writing, final)
    sync_folder(final.parent)


def abandon(writing: pathlib.Path) -> None:
    """Frees the space of a failed save, as far as that is possible."""
    shutil.rmtree(writing, ignore_errors=True)


def prune(folder: pathlib.Path, *, step: int, keep: int) -> str | None:
    """Deletes steps older than the `keep` newest up to `step`, and what was replaced.

    Steps newer than `step` are of a future that was walked back from: they stay until
    they are saved again. Returns why it could not delete, which loses nothing.
    """
    kept: set[int] = set()
    try:
        for left in folder.glob("*.deleting"):
            shutil.rmtree(left)
        for found, path in step_folders(folder):
            if found > step:
                continue
            if found not in kept and len(kept) < keep:
                kept.add(found)
                continue
            doomed = path.with_name(f"{path.name}.deleting")
            os.rename(path, doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        return str(error)
    return None


def write_synced(path: pathlib.Path, data: bytes) -> None:
    """Writes a file and its contents to the disk; its name needs `sync_folders`."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folders(root: pathlib.Path) -> None:
    """`sync_folder` for a folder and all below it, several at once."""
    folders = [pathlib.Path(folder) for folder, _, _ in os.walk(root)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        collections.deque(pool.map(sync_folder, folders), maxlen=0)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes the names in a folder durable, as fsync of a file does not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
