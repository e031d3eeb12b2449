"""Dropout whose mask depends on the row's global id, not on where the row lives."""

import jax
import jax.numpy as jnp


def dropout(
    x_BTD: jax.Array, rows_B: jax.Array, key: jax.Array | None, *, rate: float
) -> jax.Array:
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate).

    The mask of a row is drawn from fold_in(key, row id): the same on every mesh and for
    every number of microbatches. No key or no rate: x itself.
    """
    if key is None or rate == 0.0:
        return x_BTD

    def row_mask(row: jax.Array) -> jax.Array:
        row_key = jax.random.fold_in(key, row)
        return jax.random.bernoulli(row_key, 1.0 - rate, x_BTD.shape[1:])

    kept_BTD = jax.vmap(row_mask)(rows_B)
    return jnp.where(kept_BTD, x_BTD / (1.0 - rate), 0).astype(x_BTD.dtype)
