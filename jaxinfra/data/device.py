"""Host rows to global arrays, ahead of time; `digests` tells what has arrived.

Each process reads only the rows that its own devices hold. What goes to the device are
arrays in their small dtypes (token and segment ids, pixels); the step makes everything
else from them.
"""

import collections
import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxinfra.config import DataError

_ASK_EVERY_SECS = 0.5  # whether to give up a batch that does not come

Arrays = TypeVar("Arrays", bound=tuple)  # a NamedTuple of arrays, None where absent


class Fetched(NamedTuple):
    """A batch of `prefetch`."""

    step: int
    batch: Any
    wait_secs: float  # that the consumer waited for this batch


def to_device(
    host_rows: Callable[[int, np.ndarray], Arrays],
    step: int,
    *,
    batch_size: int,
    sharding: jax.NamedSharding,
) -> Arrays:
    """The global batch of a step: what `host_rows` returns, its arrays on the devices.

    `host_rows(step, positions)` (`Stream.batch`, `Evaluation.batch`) is called once in
    each process, with the sorted positions that this process's devices need, and
    returns a NamedTuple of arrays [rows, ...], each of its own rank and dtype, or None.
    The first entry of the sharding's spec splits the rows of all; other dims arrive
    whole. Raises DataError if the rows do not divide over the devices.
    """
    over_rows = (*sharding.spec, None)[0]

    def place(rank: int) -> jax.NamedSharding:
        return jax.NamedSharding(sharding.mesh, jax.P(over_rows, *[None] * (rank - 1)))

    try:
        blocks = place(1).addressable_devices_indices_map((batch_size,))
    except ValueError as error:
        raise DataError(
            f"train.batch_size={batch_size} rows do not divide over {sharding}; set "
            "train.batch_size to a multiple of the product of the mesh axes that rows "
            "lie on"
        ) from error
    spans = {b[0].indices(batch_size)[:2] for b in blocks.values() if b is not None}
    is_needed = np.zeros(batch_size, bool)
    for start, stop in spans:
        is_needed[start:stop] = True
    host = host_rows(step, np.flatnonzero(is_needed))
    # Where each position of the global batch stands among the rows that were read.
    offsets = np.concatenate([[0], np.cumsum(is_needed)])

    def on_devices(array: np.ndarray | None) -> jax.Array | None:
        if array is None:
            return None

        def block(index: Any) -> np.ndarray:  # a slice for each dim
            start, stop, _ = index[0].indices(batch_size)
            return array[offsets[start] : offsets[stop]]

        return jax.make_array_from_callback(
            (batch_size, *array.shape[1:]), place(array.ndim), block, dtype=array.dtype
        )

    return type(host)(*map(on_devices, host))


def prefetch(
    make_batch: Callable[[int], Any],
    start_step: int,
    stop_step: int,
    *,
    depth: int = 2,
    gives_up: Callable[[], bool] = lambda: False,
) -> Iterator[Fetched]:
    """Batches of steps start_step .. stop_step - 1, made up to `depth` steps ahead.

    One background thread calls `make_batch`; depth 0 calls it in the consumer. What it
    raises is raised at its step, with its own traceback. Closing the iterator (use
    `contextlib.closing`), its end or its error ends the thread: after the batch that is
    being made, never later. `gives_up` is asked while a batch is waited for, as long as
    storage is away: where it is true the iterator ends, and its thread is left alone.
    """
    if depth < 0:
        raise DataError(f"prefetch depth={depth} must be 0 or more")
    if depth == 0:
        return _fetch(make_batch, range(start_step, stop_step))
    return _fetch_ahead(make_batch, range(start_step, stop_step), depth, gives_up)


def until_none_comes(
    batches: Iterator[Fetched], failed: list[DataError]
) -> Iterator[Fetched]:
    """`batches` as far as they can be had; the DataError that ends them is put into
    `failed` instead of raised, so that what was learned until then can be saved."""
    with contextlib.closing(batches):
        try:
            yield from batches
        except DataError as error:
            failed.append(error)


def _fetch(make_batch: Callable[[int], Any], steps: range) -> Iterator[Fetched]:
    for step in steps:
        start_secs = time.perf_counter()
        batch = make_batch(step)
        yield Fetched(step, batch, time.perf_counter() - start_secs)
        del batch  # else it stays alive while the next one is made


def _fetch_ahead(
    make_batch: Callable[[int], Any],
    steps: range,
    depth: int,
    gives_up: Callable[[], bool],
) -> Iterator[Fetched]:
    todo: queue.SimpleQueue[tuple[int, Future] | None] = queue.SimpleQueue()

    def submit(step: int) -> Future:
        future: Future = Future()
        todo.put((step, future))
        return future

    # A daemon: a process may end while it waits for a server.
    thread = threading.Thread(
        target=_make_all, args=(make_batch, todo), name="prefetch", daemon=True
    )
    thread.start()
    ahead = collections.deque(map(submit, steps[:depth]))
    try:
        for step in steps:
            start_secs = time.perf_counter()
            future = ahead.popleft()
            while not concurrent.futures.wait([future], _ASK_EVERY_SECS).done:
                if gives_up():
                    thread = None
                    return
            batch = future.result()
            wait_secs = time.perf_counter() - start_secs
            if step + depth < steps.stop:
                ahead.append(submit(step + depth))
            del future  # it holds the batch
            yield Fetched(step, batch, wait_secs)
            del batch  # as above
    finally:
        for future in ahead:
            future.cancel()
        todo.put(None)
        if thread is not None:
            thread.join()


def _make_all(make_batch: Callable[[int], Any], todo: queue.SimpleQueue) -> None:
    """Makes the batch of each (step, future) until there is None."""
    while (item := todo.get()) is not None:
        step, future = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(make_batch(step))
            except BaseException as error:
                future.set_exception(error)
        del item, future  # else the batch stays alive until the next
