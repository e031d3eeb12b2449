"""Attention of a device's part of the rows to keys that come from the others.

Inside a `shard_map`, rows in `context.row_order`: device i of P has chunks i and
2 P - 1 - i of every row. Parts of the result are merged by their log-sum-exp. The
backward pass is written out: it sends keys and their gradients round a second time, so
that neither scores nor keys that passed by are kept.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxinfra.parallel import meeting
from jaxinfra.parallel.meeting import Keys, Queries


class _Settings(NamedTuple):
    window: int
    softcap: float
    kernel: str


def attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    window: int,
    softcap: float,
    kernel: str,
) -> jax.Array:
    """Ring attention: while keys meet the queries here, they are on the way to the next
    device. With a window, keys that are out of sight are not computed."""
    settings = _Settings(window, softcap, kernel)
    return _ring(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings)


def attend_gathered(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    window: int,
    softcap: float,
    kernel: str,
) -> jax.Array:
    """All keys come at once; each half of the queries meets the chunks that it sees."""
    settings = _Settings(window, softcap, kernel)
    way = _gathered if kernel == "xla" else _gathered_fused
    return way(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings):
    return _ring_forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings)[0]


def _ring_forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings):
    queries, own = _own(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
    P = jax.lax.axis_size("context")
    coming = _passed_on(own)
    result = meeting.forward(queries, own, is_causal=True, **settings._asdict())

    def turn(carry, step):
        keys, result = carry
        after = _passed_on(keys)
        return (after, meeting.merged(result, met(keys, step))), None

    def met(keys, step):
        return _by_place(
            step,
            settings,
            lambda keys: meeting.forward(queries, keys.low(), **settings._asdict()),
            lambda keys: meeting.high_only(
                meeting.forward(queries.high(), keys, **settings._asdict())
            ),
            lambda keys: meeting.nothing(queries),
            keys,
        )

    if P > 1:
        steps = jnp.arange(1, P - 1)
        (last, result), _ = jax.lax.scan(turn, (coming, result), steps)
        result = meeting.merged(result, met(last, jnp.int32(P - 1)))
    return _whole(q_BTKGH, k_BSKH, v_BSKH, segments_BT, result)


def _ring_backward(settings, residuals, g_BTKGH):
    q_BTKGH, k_BSKH, v_BSKH, segments_BT, out_BTKGH, log_sum_BTKG = residuals
    queries, own = _own(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
    asked = meeting.Asked(g_BTKGH, out_BTKGH, log_sum_BTKG)
    P = jax.lax.axis_size("context")
    backward = functools.partial(meeting.backward, **settings._asdict())
    coming = _passed_on(own)
    dq_BTKGH, dk_BSKH, dv_BSKH = backward(queries, own, asked, is_causal=True)

    def met(keys, step):
        return _by_place(
            step,
            settings,
            lambda keys: _of_low_keys(backward(queries, keys.low(), asked)),
            lambda keys: _of_high_queries(backward(queries.high(), keys, asked.high())),
            lambda keys: tuple(map(_zeros, (q_BTKGH, k_BSKH, v_BSKH))),
            keys,
        )

    def turn(carry, step):
        keys, dq_BTKGH, sums = carry
        after, sums = _passed_on(keys), _passed_on(sums)
        more, *mine = met(keys, step)
        return (after, dq_BTKGH + more, _added(sums, mine)), None

    sums = (dk_BSKH, dv_BSKH)
    if P > 1:
        carry = (coming, dq_BTKGH, sums)
        # The last turn's keys go on for nothing: one loop, for one exchange of P.
        (_, dq_BTKGH, sums), _ = jax.lax.scan(turn, carry, jnp.arange(1, P))
        sums = _passed_on(sums)  # home
    dk_BSKH, dv_BSKH = sums
    return (
        dq_BTKGH.astype(q_BTKGH.dtype),
        dk_BSKH.astype(k_BSKH.dtype),
        dv_BSKH.astype(v_BSKH.dtype),
        None,
    )


_ring.defvjp(_ring_forward, _ring_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gathered(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings):
    return _gathered_forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings)[0]


def _gathered_forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings):
    queries, own = _own(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
    forward = functools.partial(meeting.forward, **settings._asdict())
    chunks = _all_chunks(own)

    def half(queries):
        def add(chunk, result):
            keys = _chunk(chunks, chunk)
            return meeting.merged(result, forward(queries, keys, is_causal=True))

        first, last = _seen_chunks(queries, settings)
        return jax.lax.fori_loop(first, last, add, meeting.nothing(queries))

    result = meeting.joined(half(queries.low()), half(queries.high()))
    return _whole(q_BTKGH, k_BSKH, v_BSKH, segments_BT, result)


def _gathered_backward(settings, residuals, g_BTKGH):
    q_BTKGH, k_BSKH, v_BSKH, segments_BT, out_BTKGH, log_sum_BTKG = residuals
    queries, own = _own(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
    asked = meeting.Asked(g_BTKGH, out_BTKGH, log_sum_BTKG)
    backward = functools.partial(meeting.backward, **settings._asdict())
    chunks = _all_chunks(own)

    def half(queries, asked, sums):
        def add(chunk, carry):
            dq_BTKGH, sums = carry
            keys = _chunk(chunks, chunk)
            more, *mine = backward(queries, keys, asked, is_causal=True)
            put = lambda whole, part: whole.at[chunk].add(part)
            return dq_BTKGH + more, jax.tree.map(put, sums, tuple(mine))

        first, last = _seen_chunks(queries, settings)
        return jax.lax.fori_loop(first, last, add, (_zeros(queries.q_BTKGH), sums))

    sums = tuple(map(_zeros, (chunks.k_BSKH, chunks.v_BSKH)))
    low, sums = half(queries.low(), asked.low(), sums)
    high, sums = half(queries.high(), asked.high(), sums)
    dk_BSKH, dv_BSKH = map(_sum_of_own, sums)
    return (
        jnp.concatenate([low, high], axis=1).astype(q_BTKGH.dtype),
        dk_BSKH.astype(k_BSKH.dtype),
        dv_BSKH.astype(v_BSKH.dtype),
        None,
    )


_gathered.defvjp(_gathered_forward, _gathered_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gathered_fused(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings):
    return _fused_forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings)[0]


def _fused_forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings):
    queries, own = _own(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
    forward = functools.partial(meeting.forward, **settings._asdict())
    at_home = lambda half: forward(*half, is_causal=True)
    halves, chunks = _halves(queries), _all_chunks(own)
    results = jax.lax.map(at_home, (halves, _halves(own)))

    def turn(results, step):
        half, chunk = _meeting_of(step)
        part = forward(_chunk(halves, half), _chunk(chunks, chunk))
        result = meeting.merged(_chunk(results, half), part)
        return jax.tree.map(lambda x, new: x.at[half].set(new), results, result), None

    results, _ = jax.lax.scan(turn, results, _meetings())
    result = jax.tree.map(_unhalved, results)
    return _whole(q_BTKGH, k_BSKH, v_BSKH, segments_BT, result)


def _fused_backward(settings, residuals, g_BTKGH):
    q_BTKGH, k_BSKH, v_BSKH, segments_BT, out_BTKGH, log_sum_BTKG = residuals
    queries, own = _own(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
    asked = _halves(meeting.Asked(g_BTKGH, out_BTKGH, log_sum_BTKG))
    backward = functools.partial(meeting.backward, **settings._asdict())
    at_home = lambda half: backward(*half, is_causal=True)
    halves, chunks = _halves(queries), _all_chunks(own)
    dq, dk, dv = jax.lax.map(at_home, (halves, _halves(own), asked))

    def turn(sums, step):
        half, chunk = _meeting_of(step)
        given = _chunk(halves, half), _chunk(chunks, chunk), _chunk(asked, half)
        put = lambda sum, part, at: sum.at[at].add(part)
        return jax.tree.map(put, sums, backward(*given), (half, chunk, chunk)), None

    sums = (dq, *map(_zeros, (chunks.k_BSKH, chunks.v_BSKH)))
    (dq, *sums), _ = jax.lax.scan(turn, sums, _meetings())
    dk_BSKH, dv_BSKH = _added(map(_unhalved, (dk, dv)), map(_sum_of_own, sums))
    return (
        _unhalved(dq).astype(q_BTKGH.dtype),
        dk_BSKH.astype(k_BSKH.dtype),
        dv_BSKH.astype(v_BSKH.dtype),
        None,
    )


_gathered_fused.defvjp(_fused_forward, _fused_backward)


def _meetings() -> jax.Array:
    """Of device i of P the first half of the queries sees i whole chunks, the second
    one 2 P - 1 - i, so that there are as many meetings on every device."""
    return jnp.arange(2 * jax.lax.axis_size("context") - 1)


def _meeting_of(step) -> tuple[jax.Array, jax.Array]:
    """(the half of the queries, the chunk of keys) of one of `_meetings`."""
    here = jax.lax.axis_index("context")
    half = (step >= here).astype(jnp.int32)
    return half, step - half * here


def _whole(q_BTKGH, k_BSKH, v_BSKH, segments_BT, result):
    """(The result, residuals). What the backward pass reads of the whole is named for
    remat, so that none of its parts need be kept, or made again."""
    out_BTKGH = checkpoint_name(result.out_BTKGH.astype(q_BTKGH.dtype), "attention")
    log_sum_BTKG = checkpoint_name(result.log_sum_BTKG, "attention")
    residuals = (q_BTKGH, k_BSKH, v_BSKH, segments_BT, out_BTKGH, log_sum_BTKG)
    return out_BTKGH, residuals


def _own(q_BTKGH, k_BSKH, v_BSKH, segments_BT) -> tuple[Queries, Keys]:
    """What this device has, with the place of each token in its row."""
    P, here = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    size = q_BTKGH.shape[1] // 2
    places_T = jnp.arange(size, dtype=jnp.int32)
    places_T = jnp.concatenate(
        [here * size + places_T, (2 * P - 1 - here) * size + places_T]
    )
    return (
        Queries(q_BTKGH, places_T, segments_BT),
        Keys(k_BSKH, v_BSKH, places_T, segments_BT),
    )


def _by_place(step, settings, earlier, later, unseen, keys) -> Any:
    """Keys of device j = here - step: queries of a later device see their first half;
    of an earlier one the second half of the queries sees all of them. Either way half
    of all scores are computed."""
    P, here = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    size = keys.k_BSKH.shape[1] // 2
    j = (here - step) % P
    branch = jnp.where(j < here, 0, 1)
    if settings.window:
        away = jnp.where(
            j < here, here - j, jnp.minimum(j - here, 2 * P - 1 - here - j)
        )
        branch = jnp.where((away - 1) * size + 1 < settings.window, branch, 2)
    return jax.lax.switch(branch, [earlier, later, unseen], keys)


def _passed_on(tree: Any) -> Any:
    P = jax.lax.axis_size("context")
    pairs = [(i, (i + 1) % P) for i in range(P)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", pairs), tree)


def _all_chunks(own: Keys) -> Keys:
    """Every chunk of the rows in order, along a new first dim."""

    def gather(halves):
        lows, highs = (jax.lax.all_gather(half, "context") for half in halves)
        return jnp.concatenate([lows, highs[::-1]], axis=0)

    return jax.tree.map(gather, _halves(own))


def _sum_of_own(chunks: jax.Array) -> jax.Array:
    """Over devices, of the chunks [2 P, B, S, ...] that are this one's."""
    P = chunks.shape[0] // 2
    lows, highs = chunks[:P], chunks[P:][::-1]
    scatter = functools.partial(
        jax.lax.psum_scatter, axis_name="context", scatter_dimension=0
    )
    return jnp.concatenate([scatter(lows), scatter(highs)], axis=1)


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


def _seen_chunks(queries: Queries, settings: _Settings):
    """The chunks [first, last) with keys that any of these queries may see."""
    size = queries.places_T.size
    own = queries.places_T[0] // size
    if not settings.window:
        return 0, own + 1
    first = (queries.places_T[0] - settings.window + 1) // size
    return jnp.maximum(first, 0), own + 1


def _of_low_keys(parts):
    """Gradients by the first half of the keys, as by all of them."""
    dq_BTKGH, dk_BSKH, dv_BSKH = parts
    pad = lambda x: jnp.concatenate([x, jnp.zeros_like(x)], axis=1)
    return dq_BTKGH, pad(dk_BSKH), pad(dv_BSKH)


def _of_high_queries(parts):
    """Gradients by the second half of the queries, as by all of them."""
    dq_BTKGH, dk_BSKH, dv_BSKH = parts
    dq_BTKGH = jnp.concatenate([jnp.zeros_like(dq_BTKGH), dq_BTKGH], axis=1)
    return dq_BTKGH, dk_BSKH, dv_BSKH


def _zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape, jnp.float32)


def _added(sums, more):
    return jax.tree.map(jnp.add, tuple(sums), tuple(more))
