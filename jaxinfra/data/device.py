"""Host rows to global arrays, ahead of time; and a digest of what has arrived.

Each process reads only the rows that its own devices hold. What goes to the device are
token and segment ids in their small dtypes; the step makes everything else from them.
"""

import collections
import concurrent.futures
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data.packing import HostBatch


class Batch(NamedTuple):
    """Packed rows of the global batch on the devices of a mesh."""

    tokens_BT1: jax.Array  # uint16 or uint32 [B, T + 1]
    segments_BT1: jax.Array  # uint8, uint16 or uint32 [B, T + 1], 0 where padded


class Fetched(NamedTuple):
    """A batch of `prefetch`."""

    step: int
    batch: Batch
    wait_secs: float  # that the consumer waited for this batch


def to_device(
    host_rows: Callable[[int, np.ndarray], HostBatch],
    step: int,
    *,
    batch_size: int,
    length: int,
    sharding: jax.sharding.Sharding,
) -> Batch:
    """The global batch of a step, its [B, T + 1] arrays laid out by `sharding`.

    `host_rows(step, positions)` (`Stream.batch`, `Evaluation.batch`) is called once in
    each process, with the sorted positions that this process's devices need. Raises
    DataError if the rows do not divide over the devices.
    """
    shape = (batch_size, length + 1)
    try:
        blocks = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise DataError(
            f"train.batch_size={batch_size} rows of {length + 1} tokens do not divide "
            f"over {sharding}; set train.batch_size to a multiple of the product of "
            "the mesh axes that rows lie on"
        ) from error
    spans = {b[0].indices(batch_size)[:2] for b in blocks.values() if b is not None}
    is_needed = np.zeros(batch_size, bool)
    for start, stop in spans:
        is_needed[start:stop] = True
    host = host_rows(step, np.flatnonzero(is_needed))
    # Where each position of the global batch stands among the rows that were read.
    offsets = np.concatenate([[0], np.cumsum(is_needed)])

    def place(array_RT1: np.ndarray) -> jax.Array:
        def block(index: Any) -> np.ndarray:  # two slices
            start, stop, _ = index[0].indices(batch_size)
            return array_RT1[offsets[start] : offsets[stop], index[1]]

        return jax.make_array_from_callback(
            shape, sharding, block, dtype=array_RT1.dtype
        )

    return Batch(place(host.tokens_BT1), place(host.segments_BT1))


def prefetch(
    make_batch: Callable[[int], Batch],
    start_step: int,
    stop_step: int,
    *,
    depth: int = 2,
) -> Iterator[Fetched]:
    """Batches of steps start_step .. stop_step - 1, made up to `depth` steps ahead.

    One background thread calls `make_batch`; depth 0 calls it in the consumer. What it
    raises is raised at its step, with its own traceback. Closing the iterator (use
    `contextlib.closing`), its end or its error ends the thread: after the batch that is
    being made, never later.
    """
    if depth < 0:
        raise DataError(f"prefetch depth={depth} must be 0 or more")
    if depth == 0:
        return _fetch(make_batch, range(start_step, stop_step))
    return _fetch_ahead(make_batch, range(start_step, stop_step), depth)


def digest(batch: Batch) -> jax.Array:
    """uint32 sum over all elements of a hash of (row, column, token, segment).

    To be called inside jit: rows and columns are those of the global array, so that a
    row on the wrong device, or two rows exchanged, changes it. Wraps modulo 2**32, so
    equal on every mesh.
    """
    tokens_BT1, segments_BT1 = batch
    sharding = jax.typeof(tokens_BT1).sharding

    def index(dim: int) -> jax.Array:
        return jax.lax.broadcasted_iota(
            jnp.uint32, tokens_BT1.shape, dim, out_sharding=sharding
        )

    hash_BT1 = _mix(index(0) + jnp.uint32(0x9E3779B9))
    for x_BT1 in (index(1), tokens_BT1, segments_BT1):
        hash_BT1 = _mix(hash_BT1 + x_BT1.astype(jnp.uint32))
    return jnp.sum(hash_BT1, dtype=jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32. Source: MurmurHash3's fmix32, A. Appleby, 2011."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _fetch(make_batch: Callable[[int], Batch], steps: range) -> Iterator[Fetched]:
    for step in steps:
        start_secs = time.perf_counter()
        batch = make_batch(step)
        yield Fetched(step, batch, time.perf_counter() - start_secs)
        del batch  # else it stays alive while the next one is made


def _fetch_ahead(
    make_batch: Callable[[int], Batch], steps: range, depth: int
) -> Iterator[Fetched]:
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = collections.deque(pool.submit(make_batch, s) for s in steps[:depth])
        for step in steps:
            start_secs = time.perf_counter()
            batch = ahead.popleft().result()
            wait_secs = time.perf_counter() - start_secs
            if step + depth < steps.stop:
                ahead.append(pool.submit(make_batch, step + depth))
            yield Fetched(step, batch, wait_secs)
            del batch  # as above
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
