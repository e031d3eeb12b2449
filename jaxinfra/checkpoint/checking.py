"""A step's files against its manifest (`integrity`): sizes, then every byte.

What is wrong is a CheckpointError that names the file. Imports no jax.
"""

import concurrent.futures
import functools
import os
import pathlib
import stat
from typing import Any

import xxhash

from jaxinfra.checkpoint import commits, integrity
from jaxinfra.checkpoint.commits import CheckpointError
from jaxinfra.checkpoint.integrity import FileRecord, Manifest, require

PIECE_BYTES = 4 << 20  # Read, then digested while it is in the cores' caches.
_LARGEST = integrity.MAX_MANIFEST_BYTES


def load(step_folder: pathlib.Path) -> Manifest:
    """The manifest of a committed step; sizes and digests of files not yet looked at.

    Raises:
      CheckpointError: no manifest, a damaged one, or that of another step.
    """
    path = step_folder / integrity.MANIFEST
    try:
        if isinstance(path, pathlib.Path):
            _size(path)
        with path.open("rb") as file:
            # Sized before it is read; an object store's file ends where it ends.
            size = file.seek(0, os.SEEK_END)
            require(size <= _LARGEST, "it is larger than 256 MiB")
            file.seek(0)
            text = file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    manifest = integrity.parse(text)
    # A step may stand in a folder set aside for the moment, as `20.replaced`.
    wanted = step_folder.name.split(".")[0]
    require(
        not wanted.isdigit() or manifest.step == int(wanted),
        f"it is of step {manifest.step} in a folder of step {wanted}",
    )
    return manifest


@functools.singledispatch
def check_sizes(step_folder: Any, manifest: Manifest) -> None:
    """Looks whether every file is there with its size; quick, reads no contents.

    Raises:
      CheckpointError: naming the first that is not.
    """
    for record in manifest.files():
        _check_size(step_folder / record.path, record)


def validate(step_folder: pathlib.Path) -> list[str]:
    """Reads every byte of a checkpoint; one line for each file that is not right."""
    try:
        manifest = load(step_folder)
    except CheckpointError as error:
        return [str(error)]

    def problem(record: FileRecord) -> str | None:
        try:
            read(step_folder, record)
        except CheckpointError as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(commits.THREADS) as pool:
        return [line for line in pool.map(problem, manifest.files()) if line]


@functools.singledispatch
def read(step_folder: Any, record: FileRecord) -> None:
    """Reads a file that is exactly as written, and keeps nothing of it.

    Raises:
      CheckpointError: naming the file.
    """
    _check_size(step_folder / record.path, record)  # Before pieces are counted.
    # One buffer again and again: a sparse file may have any size.
    piece = memoryview(bytearray(max(1, min(record.bytes, PIECE_BYTES))))
    whole, rest = divmod(record.bytes, len(piece))
    read_into(step_folder, record, *[piece] * whole, piece[:rest])


@functools.singledispatch
def read_into(step_folder: Any, record: FileRecord, *buffers) -> None:
    """Fills buffers, one after the other, with a file that is exactly as written.

    Raises:
      CheckpointError: naming the file; the buffers must not be used.
    """
    path = step_folder / record.path
    _check_size(path, record)
    found = xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            for buffer in buffers:
                view = memoryview(buffer)
                for start in range(0, len(view), PIECE_BYTES):
                    piece = view[start : start + PIECE_BYTES]
                    file.readinto(piece)
                    found.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if found.hexdigest() != record.xxh3_128:
        raise CheckpointError(f"{path}: its bytes are not those written (xxh3_128)")


def _check_size(path: pathlib.Path, record: FileRecord) -> None:
    try:
        size = _size(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if size != record.bytes:
        raise CheckpointError(
            f"{path}: {size} bytes, {record.bytes} bytes were written"
        )


def _size(path: pathlib.Path) -> int:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would not end, a link leads away
        raise CheckpointError(f"{path} is no plain file")
    return status.st_size
