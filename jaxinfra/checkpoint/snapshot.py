"""Host copies of arrays, taken before the next step donates their buffers.

A process copies only its share: of the devices that hold the same shard each takes
some of its chunks, so replicas share the writing. An array may be physically padded (a
vocabulary of 257 over 8 shards of 33 is 264 rows): what lies beyond its logical shape
is cut here, so a checkpoint does not know the mesh that wrote it.

Each chunk is written as soon as it is copied, and the caller is blocked for the copies
alone, unless host memory is bounded or the copy deferred: see `staging`.
"""

import collections
import concurrent.futures
import dataclasses
import math
import queue
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

import jaxinfra

COPIERS = 2  # Threads that copy: one would get less of the cores than those that write.
CHUNK_BYTES = 64 << 20  # At most, where the shard's shape can be divided so.

Box = tuple[tuple[int, int], ...]  # First and last + 1, of every dim.
Window = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """How one array lies on disk; `shape` is the logical one.

    Every shard begins at a multiple of `chunk_shape` and ends at one, or at the end
    of the array: no chunk has two writers.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]


class Chunk(NamedTuple):
    """A chunk of this process's share: its array, where it stands, its values."""

    name: str
    box: Box
    values: np.ndarray


class Source(NamedTuple):
    """Where a chunk comes from: a window of a shard that is a device's own."""

    name: str
    box: Box
    shard: jax.Array
    window: Window


class Snapshot:
    """This process's chunks on the host; iterated over once, by a writer that says of
    each when it is `written`. `staging.Staged` is one that must wait for room."""

    is_whole = True  # whether a shard comes to the host in one piece

    def __init__(self, layouts: dict[str, ArrayLayout], sources: list[Source]):
        self.layouts = layouts
        self.blocked_secs = 0.0
        self._sources = collections.deque(sources)
        self._is_abandoned = False
        self._ready: queue.SimpleQueue[Chunk | Exception | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Starts what needs no writer: here all transfers, before one is awaited."""
        for source in self._sources:
            source.shard.copy_to_host_async()

    def finish(self) -> None:
        """Copies, while the writer writes; on return the arrays may be donated. An
        error is the writer's to raise."""
        started = time.monotonic()
        error = self._copy()
        self.blocked_secs += time.monotonic() - started
        self._ready.put(error)

    def _copy(self) -> Exception | None:
        def one(source: Source) -> None:
            if self._is_abandoned:
                return
            try:
                values = host_copy(source, is_whole=self.is_whole)
            except Exception as error:
                self.abandon(error)  # who waits for room waits no more
                raise
            self._ready.put(Chunk(source.name, source.box, values))

        try:
            with concurrent.futures.ThreadPoolExecutor(COPIERS) as pool:
                jobs = []
                while self._sources and self._has_room(self._sources[0]):
                    jobs.append(pool.submit(one, self._sources.popleft()))
                for job in jobs:
                    job.result()
        except Exception as error:
            return error
        return None

    def _has_room(self, source: Source) -> bool:
        """False: nobody will write it."""
        return not self._is_abandoned

    def __iter__(self) -> Iterator[Chunk]:
        while (found := self._ready.get()) is not None:
            if isinstance(found, Exception):
                raise found
            held, found = [found], None  # so that no name here keeps its memory
            if not self._is_abandoned:
                yield held.pop()

    def written(self, chunk: Chunk) -> None:
        """The writer keeps no reference to the chunk's values."""

    def abandon(self, error: Exception | None = None) -> None:
        """Nobody will write what is left: iterating raises the error, or ends."""
        self._is_abandoned = True
        self._ready.put(error)


def take(
    arrays: Mapping[str, jax.Array],
    *,
    logical_shapes: Mapping[str, tuple[int, ...]],
    staging_bytes: float = math.inf,
    is_deferred: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Snapshot:
    """What this process will write. The arrays may be donated when `finish` of what is
    returned has returned, which may wait for a writer.

    Raises:
      ValueError: a logical shape that does not lie within the array.
    """
    layouts = {
        name: _layout(name, array, logical_shapes.get(name), chunk_bytes)
        for name, array in arrays.items()
    }
    is_staged = is_deferred or not math.isinf(staging_bytes)
    arrays = jaxinfra.copied_on_device(arrays) if is_deferred else arrays
    sources = [
        source
        for turn, (name, array) in enumerate(arrays.items())
        for source in _share(name, array, layouts[name], turn)
    ]
    snapshot = (
        jaxinfra.Staged(layouts, sources, staging_bytes, is_deferred=is_deferred)
        if is_staged
        else Snapshot(layouts, sources)
    )
    snapshot.start()
    return snapshot


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


def _layout(
    name: str,
    array: jax.Array,
    logical_shape: tuple[int, ...] | None,
    chunk_bytes: int,
) -> ArrayLayout:
    shape = tuple(array.shape if logical_shape is None else logical_shape)
    fits = len(shape) == array.ndim and all(
        logical <= physical for logical, physical in zip(shape, array.shape)
    )
    if not fits:
        raise ValueError(
            f"array {name!r}: its logical shape {shape} must lie within its physical "
            f"shape {array.shape}; pass the shape without the padding"
        )
    shard_shape = array.sharding.shard_shape(array.shape)
    size = array.dtype.itemsize
    chunk = chunk_shape(
        array.shape, shard_shape, itemsize=size, chunk_bytes=chunk_bytes
    )
    return ArrayLayout(shape=shape, dtype=array.dtype.name, chunk_shape=chunk)


def _share(
    name: str, array: jax.Array, layout: ArrayLayout, turn: int
) -> Iterator[Source]:
    """The chunks that this process writes: of a shard's, those whose number, counted on
    from `turn`, is its replica's."""
    shard_shape = array.sharding.shard_shape(array.shape)
    num_shards = math.prod(
        -(-size // max(1, part)) for size, part in zip(array.shape, shard_shape)
    )
    replicas = len(array.sharding.device_set) // max(1, num_shards)
    for shard in array.addressable_shards:
        start = tuple(cut.start or 0 for cut in shard.index)
        inside = [
            max(0, min(part, size - first))
            for part, size, first in zip(shard_shape, layout.shape, start)
        ]
        counts = [-(-size // part) for size, part in zip(inside, layout.chunk_shape)]
        for number, index in enumerate(np.ndindex(*counts)):
            if (turn + number) % replicas == shard.replica_id:
                window = tuple(
                    slice(i * part, min((i + 1) * part, size))
                    for i, part, size in zip(index, layout.chunk_shape, inside)
                )
                box = tuple((a + w.start, a + w.stop) for a, w in zip(start, window))
                yield Source(name, box, shard.data, window)


def host_copy(source: Source, *, is_whole: bool) -> np.ndarray:
    """A chunk's values in memory that is no device's.

    `is_whole`: the shard came to the host in one piece. Else the chunk alone does: jax
    would keep a copy of the whole with the array.
    """
    [device] = source.shard.devices()
    on_device = source.shard.sharding.memory_kind == "device"
    if device.platform == "cpu" or not on_device:  # numpy views the device's buffer
        return np.array(np.asarray(source.shard)[source.window], copy=True)
    if is_whole:
        return np.asarray(source.shard)[source.window]
    return np.asarray(jaxinfra.cut_on_device(source.shard, source.window))
