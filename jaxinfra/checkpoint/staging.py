"""A snapshot that takes a bounded part of host memory, or none of the loop's time.

At most `staging_bytes` of copies wait to be written. The caller is then blocked until
the last of them is made, for most of the time that writing takes. Deferred, the devices
first copy the state (there must be room for a second one), and its way to the host, in
a thread, overlaps the next steps, bounded or not.

Limits: what is staged is counted in chunks, so one chunk may exceed the bound.
"""

import collections
import math
import threading
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from jaxinfra.checkpoint import snapshot
from jaxinfra.checkpoint.snapshot import ArrayLayout, Chunk, Source


class Staged(snapshot.Snapshot):
    """Chunks that come to the host as the writer makes room for them."""

    def __init__(
        self,
        layouts: dict[str, ArrayLayout],
        sources: list[Source],
        staging_bytes: float,
        *,
        is_deferred: bool,
    ):
        super().__init__(layouts, sources)
        self._waiting = collections.deque(sources)
        self._limit, self._is_deferred = staging_bytes, is_deferred
        self._staged_bytes, self._is_abandoned = 0, False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def copy(self) -> None:
        """Starts to copy, where that is deferred; else there must be a writer first."""
        self._sources = []
        if self._is_deferred:
            threading.Thread(target=self._copy, name="snapshot", daemon=True).start()

    def finish(self) -> None:
        """Waits for room and copies; an error is the writer's to raise."""
        if not self._is_deferred:
            self._copy()

    def _copy(self) -> None:
        """Copies all to the host, waiting for the writer where the bound is reached."""
        started = time.monotonic()
        try:
            while self._waiting:
                source = self._waiting[0]
                size = source.shard.dtype.itemsize * math.prod(
                    last - first for first, last in source.box
                )
                with self._changed:
                    self._changed.wait_for(lambda n=size: self._has_room(n))
                    if self._is_abandoned:
                        break
                    self._staged_bytes += size
                values = snapshot.host_copy(source, is_whole=math.isinf(self._limit))
                with self._changed:
                    self._waiting.popleft()
                    self._ready.append(Chunk(source.name, source.box, values))
                    del values, source
                    self._changed.notify_all()
        except Exception as error:
            self._error = error
        with self._changed:
            if not self._is_deferred:
                self.blocked_secs += time.monotonic() - started
            self._waiting.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or not self._waiting)
                if self._error is not None:
                    raise self._error
                if not self._ready:
                    return
            yield self._ready.popleft()  # kept by nobody here

    def written(self, chunk: Chunk) -> None:
        """Makes room: the writer keeps no reference to the chunk's values."""
        with self._changed:
            self._staged_bytes -= chunk.values.nbytes
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nobody will write what is left: `copy` returns and the copies are freed."""
        with self._changed:
            self._is_abandoned = True
            self._ready.clear()
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        fits = self._staged_bytes + size <= self._limit or not self._staged_bytes
        return fits or self._is_abandoned


@jax.jit
def _copies(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.copy, arrays)


def copied_on_device(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Copies that stay when the next step donates the arrays; made by the devices."""
    return _copies(dict(arrays))


def cut_on_device(shard: jax.Array, window: snapshot.Window) -> jax.Array:
    """A window of one device's array, by that device; under any mesh in use."""
    starts, stops = [w.start for w in window], [w.stop for w in window]
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=list(shard.devices()))):
        return jax.lax.slice(shard, starts, stops)
