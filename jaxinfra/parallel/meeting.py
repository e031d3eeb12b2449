"""One part of a row's queries meets one part of its keys: a part of attention, with the
log-sum-exp by which parts are merged, and its gradient given that of the whole.

By splash on TPU, cuDNN on GPU, or in blocks of queries anywhere. Softmax and sums are
float32.
Source: arXiv:2205.14135 section 3.1 and algorithm 4.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra.ops import attention
from jaxinfra.parallel import cudnn_parts, splash_parts

# What the queries see of the keys: all; of their own, those up to each; of keys with
# other places, those up to each.
Seen = Literal["all", "own", "some"]
_BLOCK = 512  # queries whose scores exist at a time


class Queries(NamedTuple):
    """q_BTKGH: as `ready` makes it. places_T: of each token in its row. segments_BT:
    None for one document."""

    q_BTKGH: jax.Array
    places_T: jax.Array
    segments_BT: jax.Array | None

    def low(self) -> "Queries":
        """The first half."""
        return jax.tree.map(lambda x: _half(x, 0), self)

    def high(self) -> "Queries":
        """The second half."""
        return jax.tree.map(lambda x: _half(x, 1), self)


class Keys(NamedTuple):
    """As `Queries`."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    places_S: jax.Array
    segments_BS: jax.Array | None

    def low(self) -> "Keys":
        """The first half."""
        return jax.tree.map(lambda x: _half(x, 0), self)


class Result(NamedTuple):
    """Attention to some keys: out_BTKGH in the kernel's type, float32 if merged; where
    none is seen log_sum_BTKG is so low that nothing of it is left in a merger."""

    out_BTKGH: jax.Array
    log_sum_BTKG: jax.Array

    def low(self) -> "Result":
        """Of the first half of the queries."""
        return jax.tree.map(lambda x: _half(x, 0), self)

    def high(self) -> "Result":
        """Of the second half of the queries."""
        return jax.tree.map(lambda x: _half(x, 1), self)


class Asked(NamedTuple):
    """As `asked` makes it: the gradient by the whole result, that result, its
    log-sum-exp, and the products of the first two summed over a head."""

    g_BTKGH: jax.Array
    out_BTKGH: jax.Array
    log_sum_BTKG: jax.Array
    mean_BTKG: jax.Array

    def low(self) -> "Asked":
        """For the first half of the queries."""
        return jax.tree.map(lambda x: _half(x, 0), self)

    def high(self) -> "Asked":
        """For the second half of the queries."""
        return jax.tree.map(lambda x: _half(x, 1), self)


def ready(q_BTKGH: jax.Array, kernel: str) -> jax.Array:
    """Queries for all the keys that they meet: splash takes scaled ones."""
    if kernel != "splash":
        return q_BTKGH
    return (q_BTKGH / math.sqrt(q_BTKGH.shape[-1])).astype(q_BTKGH.dtype)


def asked(g_BTKGH: jax.Array, out_BTKGH: jax.Array, log_sum_BTKG: jax.Array) -> Asked:
    """For all the keys of which a gradient is wanted."""
    mean_BTKG = jnp.einsum(
        "BTKGH,BTKGH->BTKG",
        g_BTKGH.astype(jnp.float32),
        out_BTKGH.astype(jnp.float32),
    )
    return Asked(g_BTKGH, out_BTKGH, log_sum_BTKG, mean_BTKG)


def forward(
    queries: Queries,
    keys: Keys,
    *,
    window: int,
    softcap: float,
    kernel: str,
    seen: Seen,
) -> Result:
    """Attention of `queries` to those of `keys` that they see."""
    if kernel == "splash":
        return _splash_forward(queries, keys, window, softcap, seen)
    if kernel == "cudnn":
        assert (window, softcap) == (0, 0.0)
        assert seen != "some"
        return _cudnn_forward(queries, keys, is_causal=seen == "own")
    one = functools.partial(
        _block_forward, keys=keys, window=window, softcap=softcap, seen=seen
    )
    blocks = jax.tree.map(_split, queries)
    return jax.tree.map(_unsplit, jax.lax.map(one, blocks))


def backward(
    queries: Queries,
    keys: Keys,
    asked: Asked,
    *,
    window: int,
    softcap: float,
    kernel: str,
    seen: Seen,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq_BTKGH, dk_BSKH, dv_BSKH), in the kernel's type, of these queries by these
    keys."""
    if kernel == "splash":
        return _splash_backward(queries, keys, asked, window, softcap, seen)
    if kernel == "cudnn":
        assert (window, softcap) == (0, 0.0)
        assert seen != "some"
        return _cudnn_backward(queries, keys, asked, is_causal=seen == "own")
    one = functools.partial(
        _block_backward, keys=keys, window=window, softcap=softcap, seen=seen
    )

    def add(sums, block):
        dq_BTKGH, *more = one(*block)
        return jax.tree.map(jnp.add, sums, tuple(more)), dq_BTKGH

    begun = (zeros(keys.k_BSKH), zeros(keys.v_BSKH))
    sums, dq = jax.lax.scan(add, begun, jax.tree.map(_split, (queries, asked)))
    return _unsplit(dq), *sums


def merged(a: Result, b: Result) -> Result:
    """Attention to the keys of both."""
    log_sum_BTKG = jnp.logaddexp(a.log_sum_BTKG, b.log_sum_BTKG)

    def weighted(part):
        share_BTKG = jnp.exp(part.log_sum_BTKG - log_sum_BTKG)
        is_none_BTKG = part.log_sum_BTKG == -jnp.inf
        return jnp.where(is_none_BTKG, 0.0, share_BTKG)[..., None] * part.out_BTKGH

    return Result(weighted(a) + weighted(b), log_sum_BTKG)


def nothing(queries: Queries) -> Result:
    """Attention to no key."""
    shape = queries.q_BTKGH.shape
    return Result(jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], -jnp.inf))


def joined(low: Result, high: Result) -> Result:
    """The results of two halves of the queries."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), low, high)


def wide(tree: Any) -> Any:
    """In float32, to be added to."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def zeros(x: jax.Array) -> jax.Array:
    """Float32, of the shape of `x`."""
    return jnp.zeros(x.shape, jnp.float32)


def added(sums, more):
    """Their sums, one by one."""
    return jax.tree.map(jnp.add, tuple(sums), tuple(more))


def _block_forward(queries, *, keys, window, softcap, seen) -> Result:
    scores_BKGTS, _ = _scores(queries, keys, window, softcap, seen)
    top_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    top_BKGT1 = jnp.where(top_BKGT1 == -jnp.inf, 0.0, top_BKGT1)
    e_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
    sum_BKGT1 = jnp.sum(e_BKGTS, axis=-1, keepdims=True)
    v_BSKH = keys.v_BSKH
    out_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        (e_BKGTS / jnp.where(sum_BKGT1 == 0, 1.0, sum_BKGT1)).astype(v_BSKH.dtype),
        v_BSKH,
        precision=attention.precision(v_BSKH),
        preferred_element_type=jnp.float32,
    )
    log_sum_BKGT = (jnp.log(sum_BKGT1) + top_BKGT1)[..., 0]
    return Result(out_BTKGH, jnp.einsum("BKGT->BTKG", log_sum_BKGT))


def _block_backward(queries, asked, *, keys, window, softcap, seen):
    q_BTKGH, k_BSKH, v_BSKH = queries.q_BTKGH, keys.k_BSKH, keys.v_BSKH
    multiply = functools.partial(
        jnp.einsum,
        precision=attention.precision(q_BTKGH),
        preferred_element_type=jnp.float32,
    )
    scores_BKGTS, slope_BKGTS = _scores(queries, keys, window, softcap, seen)
    log_sum_BKGT = jnp.einsum("BTKG->BKGT", asked.log_sum_BTKG)
    p_BKGTS = jnp.exp(scores_BKGTS - log_sum_BKGT[..., None])
    g_BTKGH = asked.g_BTKGH
    mean_BKGT = jnp.einsum("BTKG->BKGT", asked.mean_BTKG)
    dv_BSKH = multiply("BKGTS,BTKGH->BSKH", p_BKGTS.astype(g_BTKGH.dtype), g_BTKGH)
    dp_BKGTS = multiply("BTKGH,BSKH->BKGTS", g_BTKGH, v_BSKH)
    ds_BKGTS = p_BKGTS * (dp_BKGTS - mean_BKGT[..., None]) * slope_BKGTS
    ds_BKGTS = (ds_BKGTS / math.sqrt(q_BTKGH.shape[-1])).astype(q_BTKGH.dtype)
    dq_BTKGH = multiply("BKGTS,BSKH->BTKGH", ds_BKGTS, k_BSKH)
    dk_BSKH = multiply("BKGTS,BTKGH->BSKH", ds_BKGTS, q_BTKGH)
    return dq_BTKGH, dk_BSKH, dv_BSKH


def _scores(queries, keys, window, softcap, seen):
    """(scores, -inf where unseen; the slope of the cap there)."""
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        queries.q_BTKGH,
        keys.k_BSKH,
        precision=attention.precision(queries.q_BTKGH),
        preferred_element_type=jnp.float32,
    ) / math.sqrt(queries.q_BTKGH.shape[-1])
    slope_BKGTS = 1.0
    if softcap:
        bent_BKGTS = jnp.tanh(scores_BKGTS / softcap)
        scores_BKGTS, slope_BKGTS = softcap * bent_BKGTS, 1.0 - bent_BKGTS**2
    away_TS = queries.places_T[:, None] - keys.places_S[None, :]
    seen_BTS = jnp.ones((1, *away_TS.shape), bool)
    if seen != "all":
        seen_BTS &= away_TS >= 0
    if window:
        seen_BTS &= away_TS < window
    if queries.segments_BT is not None:
        same = queries.segments_BT[:, :, None] == keys.segments_BS[:, None, :]
        seen_BTS = seen_BTS & same
    return jnp.where(seen_BTS[:, None, None], scores_BKGTS, -jnp.inf), slope_BKGTS


def _splash_forward(queries, keys, window, softcap, seen) -> Result:
    given = (queries.q_BTKGH, keys.k_BSKH, keys.v_BSKH, _segments(queries, keys))
    seen = _by_kernel(queries, keys, seen)
    return Result(*splash_parts.forward(*given, seen, window=window, softcap=softcap))


def _splash_backward(queries, keys, asked, window, softcap, seen):
    return splash_parts.backward(
        queries.q_BTKGH,
        keys.k_BSKH,
        keys.v_BSKH,
        _segments(queries, keys),
        _by_kernel(queries, keys, seen),
        asked.log_sum_BTKG,
        asked.g_BTKGH,
        asked.mean_BTKG,
        window=window,
        softcap=softcap,
    )


def _by_kernel(queries, keys, seen: Seen) -> splash_parts.Seen:
    if seen == "some":
        return splash_parts.Places(queries.places_T, keys.places_S)
    return "causal" if seen == "own" else "all"


def _segments(queries, keys) -> splash_parts.Segments:
    if queries.segments_BT is None:
        return None
    return queries.segments_BT, keys.segments_BS


def _cudnn_forward(queries, keys, *, is_causal) -> Result:
    q_BTKGH = queries.q_BTKGH
    out_BTNH, log_sum_BNT = cudnn_parts.forward(
        _all_heads(q_BTKGH), *keys[:2], _same(queries, keys), is_causal=is_causal
    )
    log_sum_BTN = jnp.einsum("BNT->BTN", log_sum_BNT)
    return Result(
        out_BTNH.reshape(q_BTKGH.shape),
        log_sum_BTN.reshape(q_BTKGH.shape[:-1]),
    )


def _cudnn_backward(queries, keys, asked, *, is_causal):
    log_sum_BTKG = asked.log_sum_BTKG
    log_sum_BTN = log_sum_BTKG.reshape(*log_sum_BTKG.shape[:2], -1)
    dq_BTNH, dk_BSKH, dv_BSKH = cudnn_parts.backward(
        _all_heads(queries.q_BTKGH),
        *keys[:2],
        _same(queries, keys),
        _all_heads(asked.out_BTKGH),
        jnp.einsum("BTN->BNT", log_sum_BTN),
        _all_heads(asked.g_BTKGH),
        is_causal=is_causal,
    )
    return dq_BTNH.reshape(queries.q_BTKGH.shape), dk_BSKH, dv_BSKH


def _same(queries, keys) -> jax.Array | None:
    """[B, 1, T, S]: whether a query and a key are of one document."""
    if queries.segments_BT is None:
        return None
    return queries.segments_BT[:, None, :, None] == keys.segments_BS[:, None, None, :]


def _all_heads(x_BTKGH: jax.Array) -> jax.Array:
    B, T, K, G, H = x_BTKGH.shape
    return x_BTKGH.reshape(B, T, K * G, H)


def _half(x: jax.Array, which: int) -> jax.Array:
    return jnp.split(x, 2, axis=0 if x.ndim == 1 else 1)[which]


def _split(x: jax.Array) -> jax.Array:
    """Blocks of tokens along a new first dim."""
    if x.ndim == 1:
        return x.reshape(-1, math.gcd(x.size, _BLOCK))
    block = math.gcd(x.shape[1], _BLOCK)
    return jnp.swapaxes(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 0, 1)


def _unsplit(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
