"""Arrays from chunk files (`store`): each process reads what its mesh needs.

Read back from the manifest alone: the digest of the bytes just read is compared before
any of them is used, so a missing or stale chunk cannot read as zeros.

Limits: a restore holds this process's share in host memory, or `staging_bytes` of it
at a time.
"""

import collections
import concurrent.futures
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxinfra.checkpoint import checking, commits, integrity
from jaxinfra.checkpoint.commits import IncompatibleCheckpoint
from jaxinfra.checkpoint.integrity import ArrayRecord, Manifest
from jaxinfra.checkpoint.snapshot import Box

_ALIGNED = 64  # bytes; as XLA's CPU client wants it


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
            is_staged = not math.isinf(staging_bytes)
            blocks = {
                name: {
                    box: _block(box, manifest.arrays[name].dtype, is_staged)
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
            if is_staged:  # Their host copies may go.
                jax.block_until_ready([arrays[name] for name in names])
    return arrays


def _block(box: Box, dtype: str, is_staged: bool) -> np.ndarray:
    """Zeros, which take no memory before their first chunk lands. On the CPU an array
    at an address like this is taken as it is; not where it is to be copied and freed.
    """
    shape = [last - first for first, last in box]
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(num_bytes + 2 * _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED + is_staged * _ALIGNED // 2
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


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
    checking.read_into(folder, record, values.reshape(-1).view(np.uint8), checksum)
    for box in boxes:
        if values is blocks[box]:
            continue
        both = tuple(
            (max(one[0], other[0]), min(one[1], other[1]))
            for one, other in zip(here, box)
        )
        blocks[box][_window(both, box)] = values[_window(both, here)]


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
