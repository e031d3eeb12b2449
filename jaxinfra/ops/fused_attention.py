"""Fused kernels of causal attention: splash on TPU, cuDNN's on GPU.

Both see one device's rows and heads. `attention` tells what each covers.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from jaxinfra.ops.attention import LANES


def fused_attention(name: str) -> Callable[..., jax.Array]:
    """The kernel called `name`, splash or cudnn."""
    return {"splash": splash, "cudnn": cudnn}[name]


def splash(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    window: int,
    softcap: float,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, jax's own Pallas kernel for TPU, causal; keys are not repeated
    for the query heads of a group. `interpret` runs its program on any platform."""
    T, G, H = q_BTKGH.shape[1], q_BTKGH.shape[3], q_BTKGH.shape[4]
    if window:
        mask = splash_attention.LocalMask((T, T), (window - 1, 0), 0)
    else:
        mask = splash_attention.CausalMask((T, T))
    kernel = splash_attention.make_splash_mqa_single_device(
        splash_attention.MultiHeadMask([mask] * G),
        block_sizes=block_sizes(T),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    # The kernel wants [G, T, H] against one key head, so rows and groups are mapped.
    q_BKGTH = jnp.einsum("BTKGH->BKGTH", q_BTKGH * (1.0 / math.sqrt(H)))
    k_BKSH, v_BKSH = jnp.einsum("BSKH->BKSH", k_BSKH), jnp.einsum("BSKH->BKSH", v_BSKH)
    over_groups = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    if segments_BT is None:
        segments = None
        over_rows = jax.vmap(over_groups, in_axes=(0, 0, 0, None))
    else:
        segments = splash_attention.SegmentIds(q=segments_BT, kv=segments_BT)
        over_rows = jax.vmap(over_groups)
    out_BKGTH = over_rows(q_BKGTH.astype(q_BTKGH.dtype), k_BKSH, v_BKSH, segments)
    return jnp.einsum("BKGTH->BTKGH", out_BKGTH)


def cudnn(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    window: int,
    softcap: float,
) -> jax.Array:
    """cuDNN's fused attention for GPU, causal, through `jax.nn.dot_product_attention`.

    Limits: no cap. Segments are a mask, which cuDNN reads as numbers that it adds to
    the scores: 2 T^2 bytes a row, for all heads (jax before 0.11 may have their
    gradient made, as many again).
    """
    assert softcap == 0.0
    B, T, K, G, H = q_BTKGH.shape
    is_same = None
    if segments_BT is not None:
        is_same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTKGH.reshape(B, T, K * G, H),
        k_BSKH,
        v_BSKH,
        mask=is_same,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    # Named for remat by its primitive: `rematerialisation.CUDNN`.
    return out_BTNH.reshape(B, T, K, G, H)


@functools.cache
def block_sizes(
    length: int, keys: int = 0, is_fused: bool | None = None
) -> splash_attention.BlockSizes:
    """Largest blocks up to 512 that divide the length, and the number of keys if that
    is another. is_fused: whether one kernel makes all gradients; if None, whether it
    should.

    Beyond one block of keys the gradients of queries and of keys are two kernels: the
    fused one writes a gradient of all queries for every block of keys, memory that
    grows with the square of the length, and their sum took 2 ms a layer of Llama-3-8B
    on v5p.
    """
    largest = lambda n: next(size for size in (512, 256, LANES) if n % size == 0)
    block, key_block = largest(length), largest(keys or length)
    if is_fused is None:
        is_fused = key_block == (keys or length)
    return splash_attention.BlockSizes(
        block_q=block,
        block_kv=key_block,
        block_kv_compute=key_block,
        block_q_dkv=block,
        block_kv_dkv=key_block,
        block_kv_dkv_compute=key_block,
        block_q_dq=None if is_fused else block,
        block_kv_dq=None if is_fused else key_block,
        use_fused_bwd_kernel=is_fused,
    )
