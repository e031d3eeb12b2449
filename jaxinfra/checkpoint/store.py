"""Chunk files: every process writes its own share and reads what its mesh needs.

An array is stored as zarr3 with crc32c, so that anyone can open it with a zarr reader:
a chunk is its values in C order, little-endian, and 4 bytes of crc32c. Both that and
the XXH3-128 digest of the manifest are taken from memory, on the way to the file: they
cover the way down. Read back from the manifest alone: the digest of the bytes just
read is compared before any of them is used, so a missing or stale chunk cannot read as
zeros. Reading and writing by own threads was faster than TensorStore; `scripts/bench.py
checkpoint` has the figures.

Limits: a restore holds this process's share in host memory, or `staging_bytes` of it
at a time. Typed PRNG keys are stored by their caller as key data.
"""

import collections
import concurrent.futures
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import google_crc32c
import jax
import numpy as np
import xxhash

from jaxinfra.checkpoint import commits, integrity
from jaxinfra.checkpoint.commits import IncompatibleCheckpoint
from jaxinfra.checkpoint.integrity import ArrayRecord, FileRecord, Manifest
from jaxinfra.checkpoint.snapshot import ArrayLayout, Box, Chunk, Snapshot

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
        commits.write_synced(folder / path, pieces)
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


def read_arrays(
    folder: Any,
    manifest: Manifest,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    logical_shapes: Mapping[str, tuple[int, ...]],
    staging_bytes: float = math.inf,
    is_cast: bool = False,
) -> dict[str, jax.Array]:
    """The arrays named in `abstract`, on its shardings; what is padding reads as 0.

    A process reads the chunks under its own shards and no other, each once. At most
    `staging_bytes`, or one array, are on their way to the devices. `is_cast`: the
    dtype of a target may be another.

    Raises:
      CheckpointError: a chunk is not as written; names its file, thereby the array.
      IncompatibleCheckpoint: an array is not there, or has another shape or dtype.
    """
    for name, target in abstract.items():
        shape = logical_shapes.get(name, target.shape)
        _check_target(name, manifest, target, shape, is_cast)
    arrays: dict[str, jax.Array] = {}
    with concurrent.futures.ThreadPoolExecutor(commits.THREADS) as pool:
        for names in _batches(abstract, staging_bytes):
            # calloc: a block takes no memory before its first chunk lands.
            blocks = {
                name: {
                    box: np.zeros([b - a for a, b in box], manifest.arrays[name].dtype)
                    for box in _own_boxes(abstract[name])
                }
                for name in names
            }
            jobs = [
                (folder, manifest.arrays[name], index, boxes, blocks[name])
                for name in names
                for index, boxes in _needed(manifest.arrays[name], blocks[name]).items()
            ]
            collections.deque(pool.map(_read_chunk, jobs), maxlen=0)
            for name in names:
                arrays[name] = _place(abstract[name], blocks.pop(name))
            if not math.isinf(staging_bytes):  # Their host copies may go.
                jax.block_until_ready([arrays[name] for name in names])
    return arrays


def _batches(
    abstract: Mapping[str, jax.ShapeDtypeStruct], staging_bytes: float
) -> Iterator[list[str]]:
    """Names in order, as many at a time as fit into `staging_bytes` on the host."""
    names, staged = [], 0
    for name, target in abstract.items():
        parts = [math.prod(b - a for a, b in box) for box in _own_boxes(target)]
        size = sum(parts) * target.dtype.itemsize
        if names and staged + size > staging_bytes:
            yield names
            names, staged = [], 0
        names, staged = [*names, name], staged + size
    if names:
        yield names


def _read_chunk(
    job: tuple[Any, ArrayRecord, tuple[int, ...], list[Box], dict[Box, np.ndarray]],
) -> None:
    """Reads one chunk into every block that it overlaps."""
    folder, array, index, boxes, blocks = job
    here = _chunk_box(array, index)
    values = blocks.get(here)
    # The usual case is one chunk for one block: it is read in place.
    if values is None or values.shape != array.chunk_shape or boxes != [here]:
        values = np.empty(array.chunk_shape, array.dtype)
    record = array.chunks[_position(array, index)]
    checksum = bytearray(integrity.CHECKSUM_BYTES)
    integrity.read_into(folder, record, values.reshape(-1).view(np.uint8), checksum)
    for box in boxes:
        if values is blocks[box]:
            continue
        both = tuple(
            (max(one[0], other[0]), min(one[1], other[1]))
            for one, other in zip(here, box)
        )
        blocks[box][_window(both, box)] = values[_window(both, here)]


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


def _check_target(
    name: str,
    manifest: Manifest,
    target: jax.ShapeDtypeStruct,
    shape: tuple[int, ...],
    is_cast: bool,
) -> None:
    if name not in manifest.arrays:
        raise IncompatibleCheckpoint(
            f"step {manifest.step} has no array {name!r}; it was saved from another "
            "model or optimizer: give the config that it was saved with"
        )
    stored = manifest.arrays[name]
    dtype = stored.dtype if is_cast else target.dtype.name
    if (stored.shape, stored.dtype) != (tuple(shape), dtype):
        raise IncompatibleCheckpoint(
            f"array {name!r} of step {manifest.step} is {stored.dtype}{stored.shape}, "
            f"the model wants {target.dtype.name}{tuple(shape)}; give the config that "
            "it was saved with"
        )


def _needed(array: ArrayRecord, boxes) -> dict[tuple[int, ...], list[Box]]:
    """Chunks that overlap any of the boxes, each with those that it overlaps."""
    found = collections.defaultdict(list)
    for box in boxes:
        dims = zip(box, array.shape, array.chunk_shape, strict=True)
        ranges = [
            range(first // chunk, -(-min(last, size) // chunk) if first < size else 0)
            for (first, last), size, chunk in dims
        ]
        for index in itertools.product(*ranges):
            found[index].append(box)
    return found


def _position(array: ArrayRecord, index: tuple[int, ...]) -> int:
    """Where a chunk stands in the record's list: C order."""
    position = 0
    for i, size, chunk in zip(index, array.shape, array.chunk_shape):
        position = position * -(-size // chunk) + i
    return position


def _chunk_box(array: ArrayRecord, index: tuple[int, ...]) -> Box:
    return tuple(
        (i * chunk, min((i + 1) * chunk, size))
        for i, size, chunk in zip(index, array.shape, array.chunk_shape)
    )


def _window(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(
        slice(first - start, last - start)
        for (first, last), (start, _) in zip(inner, outer)
    )


def _own_boxes(target: jax.ShapeDtypeStruct) -> set[Box]:
    indexes = target.sharding.addressable_devices_indices_map(target.shape)
    return {_box(index, target.shape) for index in indexes.values()}


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape))


def _place(target: jax.ShapeDtypeStruct, blocks: Mapping[Box, np.ndarray]) -> jax.Array:
    def block(index: tuple[slice, ...]) -> np.ndarray:
        return blocks[_box(index, target.shape)].astype(target.dtype, copy=False)

    return jax.make_array_from_callback(target.shape, target.sharding, block)
