"""Ring attention: keys go round the devices, and meet the queries of each.

Inside a `shard_map`. Parts of the result are merged by their log-sum-exp. The backward
pass is written out: it sends keys and their gradients round a second time, so that
neither scores nor keys that passed by are kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.parallel import context_part, meeting
from jaxinfra.parallel.context_part import Settings


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    settings: Settings,
) -> jax.Array:
    """Ring attention: while keys meet the queries here, they are on the way to the next
    device. With a window, keys that are out of sight are not computed."""
    return _ring_forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings)[0]


def _ring_forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings):
    queries, own = context_part.own(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
    P, chunk = jax.lax.axis_size("context"), k_BSKH.shape[1] // 2
    forward = functools.partial(meeting.forward, **settings._asdict())
    coming = _passed_on(own)
    by_table = _is_by_table(settings)
    result = forward(queries, own, seen="some" if by_table else "own")

    def turn(carry, step):
        keys, *halves = carry
        after = _passed_on(keys)
        return (after, *met(keys, step, *halves)), None

    def met(keys, step, low, high):
        def with_(part):
            return meeting.merged(low, part.low()), meeting.merged(high, part.high())

        def whole():
            return with_(forward(queries, keys, seen="some"))

        def earlier():
            return with_(forward(queries, keys.low(), seen="all"))

        def later():
            return low, meeting.merged(high, forward(queries.high(), keys, seen="all"))

        def half():
            return _by_place(step, earlier, later)

        met = whole if by_table else half
        return _where_in_sight(step, chunk, settings, met, lambda: (low, high))

    halves = meeting.wide((result.low(), result.high()))
    if P > 1:
        steps = jnp.arange(1, P - 1)
        (last, *halves), _ = jax.lax.scan(turn, (coming, *halves), steps)
        halves = met(last, jnp.int32(P - 1), *halves)
    result = meeting.joined(*halves)
    return context_part.whole(q_BTKGH, k_BSKH, v_BSKH, segments_BT, result)


def _ring_backward(settings, residuals, g_BTKGH):
    q_BTKGH, k_BSKH, v_BSKH, segments_BT, out_BTKGH, log_sum_BTKG = residuals
    queries, own = context_part.own(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
    asked = meeting.asked(g_BTKGH, out_BTKGH, log_sum_BTKG)
    P, chunk = jax.lax.axis_size("context"), k_BSKH.shape[1] // 2
    backward = functools.partial(meeting.backward, **settings._asdict())
    coming = _passed_on(own)
    by_table = _is_by_table(settings)
    seen = "some" if by_table else "own"
    dq_BTKGH, *of_own = backward(queries, own, asked, seen=seen)

    def met(keys, step, low, high):
        def with_(dq_BTKGH, *of_keys):
            more_low, more_high = jnp.split(dq_BTKGH, 2, axis=1)
            return low + more_low, high + more_high, *of_keys

        def whole():
            return with_(*backward(queries, keys, asked, seen="some"))

        def earlier():
            dq_BTKGH, *of_low = backward(queries, keys.low(), asked, seen="all")
            pad = lambda x: jnp.concatenate([x, jnp.zeros_like(x)], axis=1)
            return with_(dq_BTKGH, *map(pad, of_low))

        def later():
            more, *of_keys = backward(queries.high(), keys, asked.high(), seen="all")
            return low, high + more, *of_keys

        def half():
            return _by_place(step, earlier, later)

        met, unseen = whole if by_table else half, map(jnp.zeros_like, of_own)
        unseen = (low, high, *unseen)
        return _where_in_sight(step, chunk, settings, met, lambda: unseen)

    def turn(carry, step):
        keys, low, high, *sums = carry
        after, sums = _passed_on(keys), _passed_on(sums)
        low, high, *mine = met(keys, step, low, high)
        return (after, low, high, *meeting.added(sums, mine)), None

    low, high, *sums = meeting.wide((*jnp.split(dq_BTKGH, 2, axis=1), *of_own))
    if P > 1:
        carry = (coming, low, high, *sums)
        # The last turn's keys go on for nothing: one loop, for one exchange of P.
        (_, low, high, *sums), _ = jax.lax.scan(turn, carry, jnp.arange(1, P))
        sums = _passed_on(sums)  # home
    dk_BSKH, dv_BSKH = sums
    return (
        jnp.concatenate([low, high], axis=1).astype(q_BTKGH.dtype),
        dk_BSKH.astype(k_BSKH.dtype),
        dv_BSKH.astype(v_BSKH.dtype),
        None,
    )


attend.defvjp(_ring_forward, _ring_backward)


def _is_by_table(settings: Settings) -> bool:
    """Whether queries meet all that a device sends, by tables of what is in sight:
    splash, of a window. Without one what is met is cut so that all of it is seen."""
    return settings.kernel == "splash" and settings.window > 0


def _by_place(step, earlier, later) -> Any:
    """Keys of device j = here - step, two chunks: queries of a later device see their
    first half; of an earlier one the second half of the queries sees all of them.
    Either way half of all scores are computed."""
    P, here = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    return jax.lax.cond((here - step) % P < here, earlier, later)


def _where_in_sight(step, chunk, settings: Settings, met, unseen) -> Any:
    """`met`, where a window shows queries here something of the chunks of device
    here - step."""
    if not settings.window:
        return met()
    P, here = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    j = (here - step) % P
    away = jnp.where(j < here, here - j, jnp.minimum(j - here, 2 * P - 1 - here - j))
    return jax.lax.cond((away - 1) * chunk + 1 < settings.window, met, unseen)


def _passed_on(tree: Any) -> Any:
    P = jax.lax.axis_size("context")
    pairs = [(i, (i + 1) % P) for i in range(P)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", pairs), tree)
