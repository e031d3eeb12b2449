"""Normalisation over the last dim, computed in float32."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """Scales the last dim to unit root mean square, then by `scale` (its size).

    Computed in float32, returned in x's dtype. Source: arXiv:1910.07467 eq. 4.
    """
    x32 = x.astype(jnp.float32)
    inv_rms = jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    return (x32 * inv_rms * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, eps: float
) -> jax.Array:
    """Zero mean and unit variance over the last dim, then `scale` and `bias`.

    Computed in float32, returned in x's dtype. Source: arXiv:1607.06450 eq. 3.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inv_std = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
    y = centred * inv_std * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype)
