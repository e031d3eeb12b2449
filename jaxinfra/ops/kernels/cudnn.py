"""cuDNN's fused attention through `jax.nn.dot_product_attention`, for GPU."""

import jax
import jax.numpy as jnp


def attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: None,
    *,
    window: int,
    softcap: float,
) -> jax.Array:
    """Causal attention of one device's rows and heads. Limits: no segments, no cap."""
    assert segments_BT is None
    assert softcap == 0.0
    B, T, K, G, H = q_BTKGH.shape
    out_BTNH = jax.nn.dot_product_attention(
        q_BTKGH.reshape(B, T, K * G, H),
        k_BSKH,
        v_BSKH,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    return out_BTNH.reshape(B, T, K, G, H)


def uncovered(*, head_width: int, dtype: jnp.dtype) -> str:
    """Why cuDNN cannot take such heads; empty if it can."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {dtype}"
    if head_width % 8 or head_width > 128:
        return f"heads of width {head_width}"
    return ""
