"""Host copies of arrays, taken before the next step donates their buffers.

A process copies only the shards it owns: addressable ones with replica id 0, which
exactly one process has. An array may be physically padded (a vocabulary of 257 over
8 shards of 33 is 264 rows): what lies beyond its logical shape is cut here, so a
checkpoint does not know the mesh that wrote it.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

CHUNK_BYTES = 64 << 20  # At most, where the shard's shape can be divided so.


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostShard:
    """A block of an array: its values and where its first one stands."""

    start: tuple[int, ...]
    values: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotArray:
    """This process's share of one array; `shape` is the logical one.

    Every shard begins at a multiple of `chunk_shape` and ends at one, or at the end
    of the array: no chunk has two writers.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]
    shards: tuple[HostShard, ...]


def take(
    arrays: Mapping[str, jax.Array],
    *,
    logical_shapes: Mapping[str, tuple[int, ...]],
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, SnapshotArray]:
    """Copies to the host what this process will write.

    All transfers start before the first is awaited. On return no copy shares memory
    with a device buffer, so the arrays may be donated.
    """
    owned = {name: _owned_shards(array) for name, array in arrays.items()}
    for shards in owned.values():
        for shard in shards:
            shard.data.copy_to_host_async()
    return {
        name: _take(name, array, owned[name], logical_shapes.get(name), chunk_bytes)
        for name, array in arrays.items()
    }


def chunk_shape(
    shape: tuple[int, ...],
    shard_shape: tuple[int, ...],
    *,
    itemsize: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[int, ...]:
    """The shard's shape, cut along its first dims until a chunk is small enough.

    A dim that is split over devices is cut into equal parts, a whole one anywhere.
    Where the former has no divisor near the wanted one, it stays and the next dim is
    tried, so a chunk may exceed `chunk_bytes`: 1-row chunks would cost more.
    """
    chunk = [max(1, size) for size in shard_shape]
    for dim, size in enumerate(chunk):
        row_bytes = itemsize * math.prod(chunk) // size
        if row_bytes * size <= chunk_bytes:
            break
        wanted = max(1, chunk_bytes // row_bytes)
        if shard_shape[dim] == shape[dim]:
            chunk[dim] = wanted
        else:
            divisor = next(n for n in range(wanted, 0, -1) if size % n == 0)
            chunk[dim] = divisor if 8 * divisor >= wanted else size
    return tuple(chunk)


def _owned_shards(array: jax.Array) -> list:
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def _take(
    name: str,
    array: jax.Array,
    shards: list,
    logical_shape: tuple[int, ...] | None,
    chunk_bytes: int,
) -> SnapshotArray:
    shape = tuple(array.shape if logical_shape is None else logical_shape)
    fits = len(shape) == array.ndim and all(
        logical <= physical for logical, physical in zip(shape, array.shape)
    )
    if not fits:
        raise ValueError(
            f"array {name!r}: its logical shape {shape} must lie within its physical "
            f"shape {array.shape}; pass the shape without the padding"
        )
    host_shards = []
    for shard in shards:
        start = tuple(index.start or 0 for index in shard.index)
        inside = tuple(
            slice(0, max(0, size - first)) for size, first in zip(shape, start)
        )
        values = _host_copy(shard)[inside]
        if values.size:
            host_shards.append(HostShard(start=start, values=values))
    return SnapshotArray(
        shape=shape,
        dtype=array.dtype.name,
        chunk_shape=chunk_shape(
            array.shape,
            array.sharding.shard_shape(array.shape),
            itemsize=array.dtype.itemsize,
            chunk_bytes=chunk_bytes,
        ),
        shards=tuple(host_shards),
    )


def _host_copy(shard: jax.Shard) -> np.ndarray:
    """Values in memory of their own, where numpy would view the device's buffer."""
    on_device = shard.data.sharding.memory_kind == "device"
    is_view = shard.device.platform == "cpu" or not on_device
    return np.array(shard.data, copy=True) if is_view else np.asarray(shard.data)
