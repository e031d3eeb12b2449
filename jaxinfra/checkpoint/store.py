"""Chunk files: every process writes its own share; `reading` is the way back.

An array is stored as zarr3 with crc32c, so that anyone can open it with a zarr reader:
a chunk is its values in C order, little-endian, and 4 bytes of crc32c. Both that and
the XXH3-128 digest of the manifest are taken from memory, on the way to the file: they
cover the way down. Reading and writing by own threads was faster than TensorStore;
`scripts/bench.py checkpoint` has the figures.

Limits: typed PRNG keys are stored by their caller as key data.
"""

import collections
import concurrent.futures
import json
from collections.abc import Iterator, Mapping
from typing import Any

import google_crc32c
import numpy as np
import xxhash

from jaxinfra.checkpoint import commits, integrity
from jaxinfra.checkpoint.integrity import ArrayRecord, FileRecord
from jaxinfra.checkpoint.snapshot import ArrayLayout, Chunk, Snapshot

# Of a chunk, as it goes through the digests and to the file while it is in the cores'
# caches; crc32c holds Python's lock for so long.
PIECE_BYTES = 1 << 20

Digests = dict[str, dict[str, str]]  # name -> path of a chunk -> its digest


def write_arrays(folder: Any, snapshot: Snapshot) -> Digests:
    """Writes this process's chunks as they come to the host; returns their digests.

    Files are synced, the folders holding them are not. Raises what the system does.
    """

    def write(chunk: Chunk) -> tuple[str, str, str]:
        layout = snapshot.layouts[chunk.name]
        starts = [first for first, _ in chunk.box]
        index = tuple(at // size for at, size in zip(starts, layout.chunk_shape))
        path = integrity.chunk_path(chunk.name, index)
        digest = xxhash.xxh3_128()
        pieces = _pieces(_padded(chunk.values, layout.chunk_shape), digest)
        try:
            commits.write_synced(folder / path, pieces)
        except Exception as error:
            snapshot.abandon(error)  # no chunk may come any more that would tell it
            raise
        snapshot.written(chunk)
        return chunk.name, path, digest.hexdigest()

    digests: Digests = {name: {} for name in snapshot.layouts}
    try:
        with concurrent.futures.ThreadPoolExecutor(commits.THREADS) as pool:
            jobs = collections.deque()
            for chunk in snapshot:
                jobs.append(pool.submit(write, chunk))
                del chunk
                while jobs and jobs[0].done():
                    _note(digests, jobs.popleft())
            while jobs:
                _note(digests, jobs.popleft())
    finally:
        snapshot.abandon()
    return digests


def describe_arrays(
    folder: Any, arrays: Mapping[str, ArrayLayout], digests: list[Digests]
) -> dict[str, ArrayRecord]:
    """Records of all arrays from all processes' digests; writes the `zarr.json`s.

    Raises:
      KeyError: a chunk that no process wrote.
    """

    def describe(item: tuple[str, ArrayLayout]) -> ArrayRecord:
        name, array = item
        found = {path: one for part in digests for path, one in part[name].items()}
        size = integrity.chunk_file_bytes(array.chunk_shape, array.dtype)
        zarr_json = json.dumps(_metadata(array)).encode()
        path = f"{integrity.array_folder(name)}/zarr.json"
        commits.write_synced(folder / path, [zarr_json])
        indexes = integrity.grid(array.shape, array.chunk_shape)
        paths = [integrity.chunk_path(name, index) for index in indexes]
        return ArrayRecord(
            shape=array.shape,
            dtype=array.dtype,
            chunk_shape=array.chunk_shape,
            zarr_json=FileRecord(
                path=path, bytes=len(zarr_json), xxh3_128=integrity.digest(zarr_json)
            ),
            chunks=tuple(
                FileRecord(path=path, bytes=size, xxh3_128=found[path])
                for path in paths
            ),
        )

    with concurrent.futures.ThreadPoolExecutor(commits.THREADS) as pool:
        return dict(zip(arrays, pool.map(describe, arrays.items()), strict=True))


def _note(digests: Digests, job: concurrent.futures.Future) -> None:
    name, path, digest = job.result()
    digests[name][path] = digest


def _pieces(data: np.ndarray, digest: Any) -> Iterator[Any]:
    """A chunk's bytes and its crc32c; `digest` has seen all of them in the end."""
    checksum = 0
    for start in range(0, len(data), PIECE_BYTES):
        piece = data[start : start + PIECE_BYTES]
        checksum = google_crc32c.extend(checksum, piece)
        digest.update(piece)
        yield piece
    trailer = checksum.to_bytes(integrity.CHECKSUM_BYTES, "little")
    digest.update(trailer)
    yield trailer


def _padded(values: np.ndarray, chunk_shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a chunk's values: at the edge zarr fills up with zeros."""
    if values.shape != chunk_shape:
        full = np.zeros(chunk_shape, values.dtype)
        full[tuple(map(slice, values.shape))] = values
        values = full
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _metadata(array: ArrayLayout) -> dict:
    """`zarr.json`. Source: Zarr core specification 3.0; its bytes and crc32c codecs."""
    is_bytes = integrity.ITEM_BYTES[array.dtype] == 1
    endian = {} if is_bytes else {"configuration": {"endian": "little"}}
    grid = {"chunk_shape": list(array.chunk_shape)}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": False if array.dtype == "bool" else 0,
        "codecs": [{"name": "bytes", **endian}, {"name": "crc32c"}],
    }
