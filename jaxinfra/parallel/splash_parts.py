"""Splash attention to a part of the keys, and its gradient given that of the whole.

jax's Pallas kernels for TPU: its forward one returns the log-sum-exp as well, and its
two backward ones are called here with that of the whole. They skip blocks of scores
that a mask hides by tables that jax makes of a mask while it traces; where it depends
on the device which keys are seen, such tables are made here, as the program runs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

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

# Of queries and of keys, by row; None for one document.
Segments = tuple[jax.Array, jax.Array] | None
_NONE, _SOME, _ALL = 0, 1, 2  # what of a block of scores is seen, as the kernel has it
_FAR = 2**30  # blocks or tokens: more than there are
# Of a kernel's three tables, a block of scores; and how many of a TPU's scalar memory,
# which has 1 MiB: more blocks of queries are given to more than one call.
_TABLES_BYTES, _SCALAR_BYTES = 4, 900_000


class Places(NamedTuple):
    """Of queries, which are two chunks of the row of equal length, and of keys, which
    are any number of such chunks in any order."""

    queries_T: jax.Array
    keys_S: jax.Array


# Which keys a query sees: all; of as many, those up to its own; those up to its place.
Seen = Literal["all", "causal"] | Places


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
    """(out_BTKGH, its log-sum-exp float32 [B, T, K, G]) of scaled queries. A query that
    sees no key has one below -1e37, and any result. `window`: only where `seen` tells
    places."""
    outs, log_sums = [], []
    for piece, kernel in _kernels(q_BTKGH, k_BSKH, seen, window, softcap):
        run = _over_rows(kernel, _cut(segments, piece), others=3)
        out_BKGTH, (log_sum_BKGT,) = run(
            *_heads_first(q_BTKGH[:, piece], k_BSKH, v_BSKH)
        )
        outs.append(jnp.einsum("BKGTH->BTKGH", out_BKGTH))
        log_sums.append(jnp.einsum("BKGT->BTKG", log_sum_BKGT))
    return _joined(outs), _joined(log_sums)


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
    by_head = lambda x: jnp.einsum("BTKG...->BKGT...", x)
    of_queries, of_keys = [], []
    for piece, kernel in _kernels(q_BTKGH, k_BSKH, seen, window, softcap):
        run = _over_rows(_backward_of(kernel), _cut(segments, piece), others=6)
        asked = (x[:, piece] for x in (log_sum_BTKG, g_BTKGH, mean_BTKG))
        dq_BKGTH, *more = run(
            *_heads_first(q_BTKGH[:, piece], k_BSKH, v_BSKH), *map(by_head, asked)
        )
        of_queries.append(jnp.einsum("BKGTH->BTKGH", dq_BKGTH))
        of_keys.append([jnp.einsum("BKSH->BSKH", x) for x in more])
    dk_BSKH, dv_BSKH = map(_summed, zip(*of_keys, strict=True))
    return _joined(of_queries), dk_BSKH, dv_BSKH


def _backward_of(kernel: Any) -> Any:
    """The gradients by one row and key head. One block of keys takes one kernel, more
    of them two (`fused_attention.block_sizes`), and so do tables."""
    settings = kernel.kwargs
    sizes = settings["block_sizes"]
    same = ("is_mqa", "mask_value", "attn_logits_soft_cap", "mask_function")
    shared = {key: settings[key] for key in (*same, "interpret")}
    shared |= {f"{x}_layout": getattr(sizes, f"{x}_layout") for x in "qkv"}

    def run(q, k, v, log_sum, g, mean, segments):
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

    return run


def _kernels(
    q_BTKGH, k_BSKH, seen: Seen, window: int, softcap: float
) -> Iterator[tuple[slice, Any]]:
    """(which queries, a kernel for these of one row and key head)."""
    T, G, S = q_BTKGH.shape[1], q_BTKGH.shape[3], k_BSKH.shape[1]
    settings = {
        "attn_logits_soft_cap": softcap or None,
        "save_residuals": True,
        "interpret": mesh.platform() != "tpu",
    }
    if isinstance(seen, str):
        assert not window
        mask = {"all": splash_attention.FullMask, "causal": splash_attention.CausalMask}
        kernel = splash_attention.make_splash_mqa_single_device(
            splash_attention.MultiHeadMask([mask[seen]((T, S))] * G),
            block_sizes=fused_attention.block_sizes(T, S),
            **settings,
        )
        yield slice(None), kernel
        return
    sizes = fused_attention.block_sizes(T // 2, is_fused=False)
    block = sizes.block_q
    first_i, first_j = (x[::block] // block for x in seen)
    away_ij = first_i[:, None] - first_j[None, :]
    for rows in np.array_split(np.arange(T // block), calls_of(T, S)):
        piece = slice(int(rows[0]), int(rows[-1]) + 1)
        kernel = splash_attention_kernel.SplashAttentionKernel(
            *_tables(away_ij[piece], block, window),
            block_sizes=sizes,
            is_mqa=True,
            mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
            residual_checkpoint_name=None,
            mask_function=None,
            **settings,
        )
        yield slice(piece.start * block, piece.stop * block), kernel


def calls_of(queries: int, keys: int) -> int:
    """In how many calls so many queries, at given places, meet so many keys: tables of
    all their blocks must have room."""
    block = fused_attention.block_sizes(queries // 2, is_fused=False).block_q
    blocks = (queries // block) * (keys // block)
    return -(-blocks * _TABLES_BYTES // _SCALAR_BYTES)


def _tables(away_ij: jax.Array, block: int, window: int) -> tuple[Any, Any, Any]:
    """What the forward kernel, that of queries' gradients and that of keys' know of
    blocks of queries so many blocks after those of keys."""
    full, seen, masks = _masks(block, window)
    is_full = (away_ij > 0) & (away_ij < full)
    is_seen = (away_ij >= 0) & (away_ij < seen)
    kind_ij = jnp.where(is_full, _ALL, jnp.where(is_seen, _SOME, _NONE))
    number_ij = jnp.where(kind_ij == _SOME, jnp.maximum(away_ij - full + 1, 0), 0)
    info = functools.partial(splash_attention_mask_info.MaskInfo, q_sequence=None)

    def known(by_i, masks):
        data, number, kind = by_i
        return info(
            data_next=data[None],
            mask_next=number[None],
            block_mask=kind[None],
            partial_mask_blocks=jnp.asarray(masks),
        )

    by_key = (x.T for x in _packed(kind_ij.T, number_ij.T, seen))
    of_keys = known(by_key, masks.swapaxes(1, 2))
    # What sees nothing meets one block, all of it hidden: the kernel's sum is not 0.
    is_none_i1 = ~jnp.any(is_seen, axis=1, keepdims=True)
    is_met_ij = is_none_i1 & (jnp.arange(away_ij.shape[1]) == 0)
    kind_ij = jnp.where(is_met_ij, _SOME, kind_ij)
    number_ij = jnp.where(is_met_ij, len(masks), number_ij)
    masks = np.concatenate([masks, np.zeros_like(masks[:1])])
    of_queries = known(_packed(kind_ij, number_ij, seen), masks)
    return of_queries, of_queries, of_keys


@functools.cache
def _masks(block: int, window: int) -> tuple[int, int, np.ndarray]:
    """(from which distance on a block of queries does not see all of one of keys; from
    which on nothing; what it sees of it at 0, and between these two)."""
    full = max(1, window // block) if window else _FAR
    seen = (window + block - 2) // block + 1 if window else _FAR
    places = np.arange(block)
    masks = []
    for blocks in (0, *range(full, seen)):
        away = blocks * block + places[:, None] - places[None, :]
        masks.append((away >= 0) & (away < (window or _FAR)))
    return full, seen, np.stack(masks)


def _packed(kind_ij, number_ij, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(j, number of the mask, kind) of the blocks that each i sees, up to `most`; after
    them j is as before, so that nothing is fetched."""
    is_none_ij = kind_ij == _NONE
    j = jnp.broadcast_to(jnp.arange(kind_ij.shape[1]), kind_ij.shape)
    _, *sorted_ = jax.lax.sort((is_none_ij, j, number_ij, kind_ij), num_keys=1)
    j, number, kind = (x[:, :most] for x in sorted_)
    is_seen = kind != _NONE
    is_last = is_seen & ~jnp.pad(is_seen, ((0, 0), (0, 1)))[:, 1:]
    last = jnp.sum(jnp.where(is_last, j, 0), axis=1, keepdims=True)
    # In the narrowest integers, of `_TABLES_BYTES` together.
    narrow = np.min_scalar_type(-max(kind_ij.shape))
    j = jnp.where(is_seen, j, last).astype(narrow)
    return j, number.astype(jnp.int8), kind.astype(jnp.int8)


def _cut(segments: Segments, piece: slice) -> Segments:
    return segments and (segments[0][:, piece], segments[1])


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _summed(parts: Sequence[jax.Array]) -> jax.Array:
    """As it is, or float32."""
    if len(parts) == 1:
        return parts[0]
    return functools.reduce(jnp.add, (x.astype(jnp.float32) for x in parts))


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
