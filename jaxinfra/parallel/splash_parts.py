"""Splash attention to a part of the keys, and its gradient given that of the whole.

jax's Pallas kernels for TPU: its forward one returns the log-sum-exp as well, and its
two backward ones are called here with that of the whole. They skip blocks of scores
that a mask hides by tables that jax makes of a mask while it traces; where it depends
on the device which keys are seen, such tables are made here, as the program runs.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask_info,
)

from jaxinfra import mesh
from jaxinfra.ops import fused_attention

# Which keys a query sees: all; those up to its own place, of as many; those up to its
# place, one for each query, of keys from place 0 on.
Seen = Literal["all", "causal"] | jax.Array
# Of queries and of keys, by row; None for one document.
Segments = tuple[jax.Array, jax.Array] | None


def forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments,
    seen: Seen,
    *,
    window: int,
    softcap: float,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTKGH, its log-sum-exp float32 [B, T, K, G]) of scaled queries. `window`:
    only where `seen` tells places."""
    kernel = _kernel(q_BTKGH, k_BSKH, seen, window, softcap)
    run = _over_rows(kernel, segments, others=3)
    out_BKGTH, (log_sum_BKGT,) = run(*_heads_first(q_BTKGH, k_BSKH, v_BSKH))
    return (
        jnp.einsum("BKGTH->BTKGH", out_BKGTH),
        jnp.einsum("BKGT->BTKG", log_sum_BKGT),
    )


def backward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments,
    seen: Seen,
    log_sum_BTKG: jax.Array,
    g_BTKGH: jax.Array,
    mean_BTKG: jax.Array,
    *,
    window: int,
    softcap: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq_BTKGH, dk_BSKH, dv_BSKH) by these keys, of the gradient `g` by the whole
    result. mean_BTKG: the sum over a head of `g` times that result."""
    kernel = _kernel(q_BTKGH, k_BSKH, seen, window, softcap)
    settings = kernel.kwargs
    sizes = settings["block_sizes"]
    same = ("is_mqa", "mask_value", "attn_logits_soft_cap", "mask_function")
    shared = {key: settings[key] for key in (*same, "interpret")}
    shared |= {f"{x}_layout": getattr(sizes, f"{x}_layout") for x in "qkv"}

    def one(q, k, v, log_sum, g, mean, segments):
        given = (q, k, v, segments, None, log_sum, g, mean)
        dq, dk, dv = splash_attention_kernel._splash_attention_bwd_dkv(
            *given,
            bq=sizes.block_q_dkv,
            bkv=sizes.block_kv_dkv,
            bkv_compute=sizes.block_kv_dkv_compute,
            mask_info=kernel.dkv_mask_info,
            use_fused_bwd_kernel=sizes.use_fused_bwd_kernel,
            **shared,
        )
        if not sizes.use_fused_bwd_kernel:
            dq = splash_attention_kernel._splash_attention_bwd_dq(
                *given,
                bq=sizes.block_q_dq,
                bkv=sizes.block_kv_dq,
                mask_info=kernel.dq_mask_info,
                **shared,
            )
        return dq, dk, dv

    by_head = lambda x: jnp.einsum("BTKG...->BKGT...", x)
    run = _over_rows(one, segments, others=6)
    dq_BKGTH, *of_keys = run(
        *_heads_first(q_BTKGH, k_BSKH, v_BSKH),
        *map(by_head, (log_sum_BTKG, g_BTKGH, mean_BTKG)),
    )
    dk_BSKH, dv_BSKH = (jnp.einsum("BKSH->BSKH", x) for x in of_keys)
    return jnp.einsum("BKGTH->BTKGH", dq_BKGTH), dk_BSKH, dv_BSKH


def _kernel(q_BTKGH, k_BSKH, seen, window, softcap) -> Any:
    """For one row and key head, of queries [G, T, H]."""
    T, G, S = q_BTKGH.shape[1], q_BTKGH.shape[3], k_BSKH.shape[1]
    interpret = mesh.platform() != "tpu"
    if not isinstance(seen, str):
        return _by_places(seen, S, window, softcap, interpret)
    assert not window
    mask = {"all": splash_attention.FullMask, "causal": splash_attention.CausalMask}
    return splash_attention.make_splash_mqa_single_device(
        splash_attention.MultiHeadMask([mask[seen]((T, S))] * G),
        block_sizes=fused_attention.block_sizes(T, S),
        attn_logits_soft_cap=softcap or None,
        save_residuals=True,
        interpret=interpret,
    )


def _by_places(places_T, S, window, softcap, interpret) -> Any:
    """A kernel for queries in two chunks, at the places of each of which follow one
    another."""
    sizes = fused_attention.block_sizes(places_T.size // 2, S, is_fused=False)
    block, key_block = sizes.block_q, sizes.block_kv
    first_i = places_T.reshape(-1, block)[:, :1]
    first_j = jnp.arange(0, S, key_block)
    seen_ij = first_j < first_i + block
    if window:
        seen_ij &= first_i - (first_j + key_block - 1) < window
    # Any `block + window - 1` tokens that follow one another are in so many blocks.
    most = lambda block, n: (window + block - 3) // n + 2 if window else S
    by_query = _blocks(seen_ij, most(block, key_block))
    by_key = _blocks(seen_ij.T, most(key_block, block))
    info = functools.partial(
        splash_attention_mask_info.MaskInfo,
        mask_next=None,
        partial_mask_blocks=None,
        q_sequence=places_T,
    )
    of_queries = info(data_next=by_query[0][None], block_mask=by_query[1][None])
    of_keys = info(data_next=by_key[0].T[None], block_mask=by_key[1].T[None])
    return splash_attention_kernel.SplashAttentionKernel(
        of_queries,
        of_queries,
        of_keys,
        block_sizes=sizes,
        is_mqa=True,
        save_residuals=True,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=None,
        mask_function=_sees(window),
        interpret=interpret,
    )


def _blocks(seen_ij: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """(j, whether there is one) of the blocks that each i sees, up to `most`; where
    there is none, j is as before, so that nothing is fetched."""
    order = jnp.argsort(~seen_ij, axis=1, stable=True)[:, :most]
    count_i1 = jnp.sum(seen_ij, axis=1, keepdims=True)
    step = jnp.arange(order.shape[1])
    last = jnp.take_along_axis(order, jnp.maximum(count_i1 - 1, 0), axis=1)
    is_seen = step < count_i1
    # In the narrowest integers: the kernel keeps them in its scalar memory.
    narrow = jnp.int8 if seen_ij.shape[1] < 2**7 else jnp.int16
    return jnp.where(is_seen, order, last).astype(narrow), is_seen.astype(jnp.int8)


@functools.cache  # one object, by which jax knows a kernel that it has traced
def _sees(window: int) -> Any:
    def sees(query, key):
        return (key <= query) & (query - key < window) if window else key <= query

    return sees


def _heads_first(q_BTKGH, k_BSKH, v_BSKH):
    q_BKGTH = jnp.einsum("BTKGH->BKGTH", q_BTKGH)
    return q_BKGTH, *(jnp.einsum("BSKH->BKSH", x) for x in (k_BSKH, v_BSKH))


def _over_rows(function, segments: Segments, *, others: int):
    """`function(*others, segments)` for every row and key head."""
    ids = None if segments is None else splash_attention.SegmentIds(*segments)
    over_heads = jax.vmap(function, in_axes=(*(0,) * others, None))
    by_row = None if ids is None else 0
    over_rows = jax.vmap(over_heads, in_axes=(*(0,) * others, by_row))
    return lambda *given: over_rows(*given, ids)
