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
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask_info,
)

from jaxinfra import mesh
from jaxinfra.ops import fused_attention

# Which keys a query sees: all; of as many, those up to its own; those up to its place
# in the row, of which there is one for each query, and one for each key.
Seen = Literal["all", "causal"] | tuple[jax.Array, jax.Array]
# Of queries and of keys, by row; None for one document.
Segments = tuple[jax.Array, jax.Array] | None
_NONE, _SOME, _ALL = 0, 1, 2  # what of a block of scores is seen, as the kernel has it


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
        return _by_places(*seen, window, softcap, interpret)
    assert not window
    mask = {"all": splash_attention.FullMask, "causal": splash_attention.CausalMask}
    return splash_attention.make_splash_mqa_single_device(
        splash_attention.MultiHeadMask([mask[seen]((T, S))] * G),
        block_sizes=fused_attention.block_sizes(T, S),
        attn_logits_soft_cap=softcap or None,
        save_residuals=True,
        interpret=interpret,
    )


def _by_places(places_T, places_S, window, softcap, interpret) -> Any:
    """A kernel for queries and keys in chunks, whole blocks of places that follow one
    another, in any order."""
    sizes = fused_attention.block_sizes(places_T.size // 2, is_fused=False)
    block = sizes.block_q
    first_i, first_j = (x[::block] // block for x in (places_T, places_S))
    kinds, numbers, masks = _by_distance(block, window)
    away_ij = first_i[:, None] - first_j[None, :]
    kind_ij, number_ij = (_at(away_ij, table) for table in (kinds, numbers))
    most = len(kinds) - 1 if window else max(kind_ij.shape)
    by_query = _tables(kind_ij, number_ij, most)
    by_key = _tables(kind_ij.T, number_ij.T, most)
    info = functools.partial(splash_attention_mask_info.MaskInfo, q_sequence=None)
    of_queries = info(*(x[None] for x in by_query), jnp.asarray(masks))
    of_keys = info(*(x.T[None] for x in by_key), jnp.asarray(masks.swapaxes(1, 2)))
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
        mask_function=None,
        interpret=interpret,
    )


def _by_distance(block: int, window: int) -> tuple[list[int], list[int], np.ndarray]:
    """Of queries so many blocks after the keys: whether they see none of them, some or
    all; which of the masks that is; the masks. The last is for all greater distances.
    """
    count = (window + block - 2) // block + 1 if window else 1
    places = np.arange(block)
    kinds, numbers, masks = [], [], []
    for blocks in range(count):
        away = blocks * block + places[:, None] - places[None, :]
        seen = (away >= 0) & (away < window if window else True)
        kinds.append(_ALL if seen.all() else _SOME)
        numbers.append(0 if seen.all() else len(masks))
        if not seen.all():
            masks.append(seen)
    kinds.append(_NONE if window else _ALL)
    return kinds, [*numbers, 0], np.stack(masks)


def _at(away_ij: jax.Array, table: list[int]) -> jax.Array:
    """The entry for each distance, the last for all that are greater, 0 below 0."""
    entries = [jnp.where(away_ij == n, x, 0) for n, x in enumerate(table[:-1])]
    return sum(entries, jnp.where(away_ij >= len(table) - 1, table[-1], 0))


def _tables(kind_ij, number_ij, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(j, number of the mask, kind) of the blocks that each i sees, up to `most`; after
    them j is as before, so that nothing is fetched."""
    is_none_ij = kind_ij == _NONE
    j = jnp.broadcast_to(jnp.arange(kind_ij.shape[1]), kind_ij.shape)
    _, *sorted_ = jax.lax.sort((is_none_ij, j, number_ij, kind_ij), num_keys=1)
    j, number, kind = (x[:, :most] for x in sorted_)
    is_seen = kind != _NONE
    is_last = is_seen & ~jnp.pad(is_seen, ((0, 0), (0, 1)))[:, 1:]
    last = jnp.sum(jnp.where(is_last, j, 0), axis=1, keepdims=True)
    # In the narrowest integers: the kernel keeps them in its scalar memory.
    narrow = np.min_scalar_type(-max(kind_ij.shape))
    j = jnp.where(is_seen, j, last).astype(narrow)
    return j, number.astype(jnp.int8), kind.astype(jnp.int8)


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
