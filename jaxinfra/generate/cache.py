"""The key-value cache: what attention keeps of the tokens that a row has had.

Slot s of a row holds the key and value of the token at position s of that row, so rows
of different lengths share one array and padding is simply never written. The cache
enters a model through `Ops.attend`, as everything about attention does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra import sharding
from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.ops import attention
from jaxinfra.ops.seam import Attend, Context
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Layout, Rules

_NAMES = ("batch", None, "heads", None)


class LayerCache(NamedTuple):
    """Keys and values of one layer in compute dtype; S is the capacity."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


def make_caches(
    cfg: ModelConfig, *, batch: int, capacity: int, policy: Policy, layout: Layout
) -> Tree:
    """Empty caches of all layers, in the form of the parameters' stack.

    ValueError where the batch or the key heads do not divide over the mesh.
    Limits: a layer with a window has as many slots as one without.
    """
    shape = (batch, capacity, cfg.num_kv_heads, cfg.head_width)

    def empty(stack: tuple[int, ...] = ()) -> LayerCache:
        names = (None,) * len(stack) + _NAMES
        place = sharding.sharding(layout, layout.params, stack + shape, names, "cache")
        zeros = jnp.zeros(stack + shape, policy.compute, out_sharding=place)
        return LayerCache(zeros, zeros)

    def each(layers: Sequence[LayerConfig], *stack: int) -> list[LayerCache]:
        return [empty(stack) for _ in layers]

    return {
        "prefix": each(cfg.prefix),
        "pattern": each(cfg.pattern, cfg.repeats),
        "suffix": each(cfg.suffix),
    }


def make_prefill_attend(attend: Attend, rules: Rules) -> Attend:
    """Attention of prompts into empty caches: training's `attend`, which may be a fused
    kernel, over the new tokens alone.

    Padding must be on the right: no token sees what follows it, so the kernel need not
    know of it, and the results of padding are never read.
    """

    def prefill_attend(q_BTKGH, k_BTKH, v_BTKH, context, cache, *, window, softcap):
        cache = _write(cache, k_BTKH, v_BTKH, context, rules)
        context = context._replace(segments_BT=None)
        a_BTKGH, _ = attend(
            q_BTKGH, k_BTKH, v_BTKH, context, None, window=window, softcap=softcap
        )
        return a_BTKGH, cache

    return prefill_attend


def make_cached_attend(rules: Rules) -> Attend:
    """Attention of new tokens over the cache, theirs included: at position p a row sees
    its slots s <= p, of a window the last.

    Limits: reads the whole capacity; scores of all T queries exist at once.
    """

    def cached_attend(q_BTKGH, k_BTKH, v_BTKH, context, cache, *, window, softcap):
        cache = _write(cache, k_BTKH, v_BTKH, context, rules)
        back_BTS = context.positions_BT[:, :, None] - jnp.arange(cache.k_BSKH.shape[1])
        seen_BTS = back_BTS >= 0
        if window:
            seen_BTS &= back_BTS < window
        return attention.masked(q_BTKGH, *cache, seen_BTS, softcap=softcap), cache

    return cached_attend


def _write(
    cache: LayerCache,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    context: Context,
    rules: Rules,
) -> LayerCache:
    """`cache` with each token at its own position; padding (segment 0) goes nowhere."""
    slots_BT = context.positions_BT
    if context.segments_BT is not None:
        beyond = cache.k_BSKH.shape[1]
        slots_BT = jnp.where(context.segments_BT > 0, slots_BT, beyond)

    def scatter(old_BSKH, new_BTKH, slots_BT):
        rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
        new_BTKH = new_BTKH.astype(old_BSKH.dtype)
        return old_BSKH.at[rows_B1, slots_BT].set(new_BTKH, mode="drop")

    # Each device scatters its own rows and heads: nothing travels.
    whole = sharding.spec(rules, *_NAMES)
    rows = sharding.spec(rules, "batch", None)
    scatter = jax.shard_map(scatter, in_specs=(whole, whole, rows), out_specs=whole)
    return LayerCache(
        scatter(cache.k_BSKH, k_BTKH, slots_BT),
        scatter(cache.v_BSKH, v_BTKH, slots_BT),
    )
