"""A snapshot that takes a bounded part of host memory, or none of the loop's time.

At most `staging_bytes` of copies wait to be written. The caller is then blocked until
the last of them is made, for most of the time that writing takes. Deferred, the devices
first copy the state (there must be room for a second one), and its way to the host, in
a thread, overlaps the next steps, bounded or not.

Limits: what is staged is counted in chunks, so one chunk may exceed the bound.
"""

import math
import threading
from collections.abc import Mapping

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
        self.is_whole = math.isinf(staging_bytes)
        self._limit, self._is_deferred = staging_bytes, is_deferred
        self._staged_bytes = 0
        self._changed = threading.Condition()

    def start(self) -> None:
        """Starts to copy, where that is deferred; else there must be a writer first."""
        if self._is_deferred:
            copy = lambda: self._ready.put(self._copy())
            threading.Thread(target=copy, name="snapshot", daemon=True).start()

    def finish(self) -> None:
        """As `Snapshot.finish`, waiting for room, unless it is another thread's."""
        if not self._is_deferred:
            super().finish()

    def written(self, chunk: Chunk) -> None:
        """Makes room: the writer keeps no reference to the chunk's values."""
        with self._changed:
            self._staged_bytes -= chunk.values.nbytes
            self._changed.notify_all()

    def abandon(self, error: Exception | None = None) -> None:
        """As `Snapshot.abandon`; who waits for room waits no more."""
        with self._changed:
            super().abandon(error)
            self._changed.notify_all()

    def _has_room(self, source: Source) -> bool:
        size = source.shard.dtype.itemsize * math.prod(
            last - first for first, last in source.box
        )
        fits = lambda: (
            self._staged_bytes + size <= self._limit
            or not self._staged_bytes
            or self._is_abandoned
        )
        with self._changed:
            self._changed.wait_for(fits)
            self._staged_bytes += size
        return super()._has_room(source)


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
