"""Attention to keys that come to a device all at once, and again for their gradients.

Inside a `shard_map`. Three ways, by kernel. Splash takes all keys in one call, with
tables of what each block of queries sees. cuDNN has no such tables: each half of the
queries meets its own chunk and every one before, in a loop that is as long on all
devices. In blocks a half meets the chunks of which a window shows it something.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.parallel import context_part, meeting
from jaxinfra.parallel.context_part import Settings
from jaxinfra.parallel.meeting import Asked, Keys, Queries, Result, added, wide, zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    settings: Settings,
) -> jax.Array:
    """Attention of this device's part of the rows to whole rows."""
    return _forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings)[0]


def _forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings):
    queries, own = context_part.own(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
    way, _ = _WAYS[settings.kernel]
    result = way(queries, own, settings)
    return context_part.whole(q_BTKGH, k_BSKH, v_BSKH, segments_BT, result)


def _backward(settings, residuals, g_BTKGH):
    q_BTKGH, k_BSKH, v_BSKH, segments_BT, out_BTKGH, log_sum_BTKG = residuals
    queries, own = context_part.own(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
    asked = meeting.asked(g_BTKGH, out_BTKGH, log_sum_BTKG)
    _, way = _WAYS[settings.kernel]
    dq_BTKGH, dk_BSKH, dv_BSKH = way(queries, own, asked, settings)
    return (
        dq_BTKGH.astype(q_BTKGH.dtype),
        dk_BSKH.astype(k_BSKH.dtype),
        dv_BSKH.astype(v_BSKH.dtype),
        None,
    )


attend.defvjp(_forward, _backward)


def _splash_forward(queries: Queries, own: Keys, settings: Settings) -> Result:
    keys = _all_keys(own)
    return meeting.forward(queries, keys, seen="some", **settings._asdict())


def _splash_backward(
    queries: Queries, own: Keys, asked: Asked, settings: Settings
) -> tuple[jax.Array, ...]:
    """(dq_BTKGH, dk_BSKH, dv_BSKH), of the keys and values that are `own`."""
    dq_BTKGH, *of_keys = meeting.backward(
        queries, _all_keys(own), asked, seen="some", **settings._asdict()
    )
    P = jax.lax.axis_size("context")

    def scatter(x):
        # Along a dim of its own: where it was cut out of the length, the compiler has
        # sent parts from device to device, which stages cannot.
        x = jnp.moveaxis(x.reshape(x.shape[0], P, -1, *x.shape[2:]), 1, 0)
        return jax.lax.psum_scatter(x, "context")

    return dq_BTKGH, *map(scatter, wide(of_keys))


def _cudnn_forward(queries: Queries, own: Keys, settings: Settings) -> Result:
    forward = functools.partial(meeting.forward, **settings._asdict())
    at_home = lambda half: forward(*half, seen="own")
    halves, chunks = _halves(queries), _all_chunks(own)
    results = wide(jax.lax.map(at_home, (halves, _halves(own))))

    def turn(results, step):
        half, chunk = _meeting_of(step)
        part = forward(_chunk(halves, half), _chunk(chunks, chunk), seen="all")
        result = meeting.merged(_chunk(results, half), part)
        return jax.tree.map(lambda x, new: x.at[half].set(new), results, result), None

    results, _ = jax.lax.scan(turn, results, _meetings())
    return jax.tree.map(_unhalved, results)


def _cudnn_backward(
    queries: Queries, own: Keys, asked: Asked, settings: Settings
) -> tuple[jax.Array, ...]:
    backward = functools.partial(meeting.backward, **settings._asdict())
    at_home = lambda half: backward(*half, seen="own")
    halves, asked, chunks = _halves(queries), _halves(asked), _all_chunks(own)
    dq, dk, dv = wide(jax.lax.map(at_home, (halves, _halves(own), asked)))

    def turn(sums, step):
        half, chunk = _meeting_of(step)
        given = _chunk(halves, half), _chunk(chunks, chunk), _chunk(asked, half)
        put = lambda sum, part, at: sum.at[at].add(part)
        parts = backward(*given, seen="all")
        return jax.tree.map(put, sums, parts, (half, chunk, chunk)), None

    sums = (dq, *map(zeros, (chunks.k_BSKH, chunks.v_BSKH)))
    (dq, *sums), _ = jax.lax.scan(turn, sums, _meetings())
    of_keys = added(map(_unhalved, (dk, dv)), map(_sum_of_own, sums))
    return _unhalved(dq), *of_keys


def _blocks_forward(queries: Queries, own: Keys, settings: Settings) -> Result:
    forward = functools.partial(meeting.forward, seen="some", **settings._asdict())
    chunks = _all_chunks(own)

    def half(queries):
        def add(chunk, result):
            return meeting.merged(result, forward(queries, _chunk(chunks, chunk)))

        first, last = _seen_chunks(queries, settings)
        return jax.lax.fori_loop(first, last, add, meeting.nothing(queries))

    return meeting.joined(half(queries.low()), half(queries.high()))


def _blocks_backward(
    queries: Queries, own: Keys, asked: Asked, settings: Settings
) -> tuple[jax.Array, ...]:
    backward = functools.partial(meeting.backward, seen="some", **settings._asdict())
    chunks = _all_chunks(own)

    def half(queries, asked, sums):
        def add(chunk, carry):
            dq_BTKGH, sums = carry
            more, *mine = backward(queries, _chunk(chunks, chunk), asked)
            put = lambda whole, part: whole.at[chunk].add(part)
            return dq_BTKGH + more, jax.tree.map(put, sums, tuple(mine))

        first, last = _seen_chunks(queries, settings)
        return jax.lax.fori_loop(first, last, add, (zeros(queries.q_BTKGH), sums))

    sums = tuple(map(zeros, (chunks.k_BSKH, chunks.v_BSKH)))
    low, sums = half(queries.low(), asked.low(), sums)
    high, sums = half(queries.high(), asked.high(), sums)
    return jnp.concatenate([low, high], axis=1), *map(_sum_of_own, sums)


_WAYS = {
    "splash": (_splash_forward, _splash_backward),
    "cudnn": (_cudnn_forward, _cudnn_backward),
    "xla": (_blocks_forward, _blocks_backward),
}


def _meetings() -> jax.Array:
    """Of device i of P the first half of the queries sees i whole chunks, the second
    one 2 P - 1 - i, so that there are as many meetings on every device."""
    return jnp.arange(2 * jax.lax.axis_size("context") - 1)


def _meeting_of(step) -> tuple[jax.Array, jax.Array]:
    """(the half of the queries, the chunk of keys) of one of `_meetings`."""
    here = jax.lax.axis_index("context")
    half = (step >= here).astype(jnp.int32)
    return half, step - half * here


def _all_keys(own: Keys) -> Keys:
    """Whole rows, by device."""

    def gather(x):
        along = 0 if x.ndim == 1 else 1
        return jax.lax.all_gather(x, "context", axis=along, tiled=True)

    return jax.tree.map(gather, own)


def _all_chunks(own: Keys) -> Keys:
    """Every chunk of the rows in order, along a new first dim."""

    def gather(halves):
        lows, highs = (jax.lax.all_gather(half, "context") for half in halves)
        return jnp.concatenate([lows, highs[::-1]], axis=0)

    return jax.tree.map(gather, _halves(own))


def _sum_of_own(chunks: jax.Array) -> jax.Array:
    """Over devices, of the chunks [2 P, B, S, ...] that are this one's."""
    lows, highs = jnp.split(chunks, 2)
    scatter = functools.partial(jax.lax.psum_scatter, axis_name="context")
    return jnp.concatenate([scatter(lows), scatter(highs[::-1])], axis=1)


def _halves(tree: Any) -> Any:
    """Both chunks that are this device's, along a new first dim."""
    split = lambda x: jnp.stack(jnp.split(x, 2, axis=0 if x.ndim == 1 else 1))
    return jax.tree.map(split, tree)


def _unhalved(x: jax.Array) -> jax.Array:
    """[2, B, T, ...] -> [B, 2 T, ...]"""
    return jnp.concatenate([x[0], x[1]], axis=1)


def _chunk(chunks: Any, number) -> Any:
    take = lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False)
    return jax.tree.map(take, chunks)


def _seen_chunks(queries: Queries, settings: Settings):
    """The chunks [first, last) with keys that any of these queries may see."""
    size = queries.places_T.size
    own = queries.places_T[0] // size
    if not settings.window:
        return 0, own + 1
    first = (queries.places_T[0] - settings.window + 1) // size
    return jnp.maximum(first, 0), own + 1
