"""Rotary position embedding."""

import jax
import jax.numpy as jnp


def rotations(
    positions_BT: jax.Array, *, head_width: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32 [B, T, H/2], for `rope`."""
    # float32: bfloat16 has 8 bits, so position 257 would round to 256.
    exponent = jnp.arange(head_width // 2, dtype=jnp.float32) / (head_width // 2)
    angles = positions_BT.astype(jnp.float32)[..., None] * theta**-exponent
    return jnp.cos(angles), jnp.sin(angles)


def rope(x: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of x [B, T, ..., H] by each position's angles.

    Source: arXiv:2104.09864 eq. 34; halves, not neighbours, as published Llama weights
    expect.
    """
    heads = x.ndim - 3
    shape = (*cos_BTh.shape[:2], *(1,) * heads, cos_BTh.shape[-1])
    cos, sin = cos_BTh.reshape(shape), sin_BTh.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
