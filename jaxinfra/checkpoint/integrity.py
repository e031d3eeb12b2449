"""Is a checkpoint what was written: sizes, digests, durable writes.

Imports no jax, so that `scripts/checkpoint.py` and a supervisor may look.
"""

import collections
import concurrent.futures
import os
import pathlib

import xxhash

from jaxinfra.checkpoint import manifest as manifests
from jaxinfra.checkpoint.errors import CheckpointError
from jaxinfra.checkpoint.manifest import FileRecord, Manifest

THREADS = 4  # They wait for the disk; more gained nothing on 2 cores.


def check_sizes(step_folder: pathlib.Path, manifest: Manifest) -> None:
    """Looks whether every file is there with its size; quick, reads no contents.

    Raises:
      CheckpointError: naming the first that is not.
    """
    for record in manifest.files():
        _check_size(step_folder / record.path, record)


def validate(step_folder: pathlib.Path) -> list[str]:
    """Reads every byte of a checkpoint; one line for each file that is not right."""
    try:
        manifest = manifests.load(step_folder)
    except CheckpointError as error:
        return [str(error)]

    def problem(record: FileRecord) -> str | None:
        try:
            _check_size(step_folder / record.path, record)  # Before room is made.
            read_into(step_folder, record, bytearray(record.bytes))
        except CheckpointError as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [line for line in pool.map(problem, manifest.files()) if line]


def read_into(step_folder: pathlib.Path, record: FileRecord, *buffers) -> None:
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
                file.readinto(buffer)
                found.update(buffer)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if found.hexdigest() != record.xxh3_128:
        raise CheckpointError(f"{path}: its bytes are not those written (xxh3_128)")


def digest(data) -> str:
    """XXH3-128 in hex: 16 GB/s on one core, and releases Python's lock."""
    return xxhash.xxh3_128_hexdigest(data)


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


def _check_size(path: pathlib.Path, record: FileRecord) -> None:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if size != record.bytes:
        raise CheckpointError(
            f"{path}: {size} bytes, {record.bytes} bytes were written"
        )
