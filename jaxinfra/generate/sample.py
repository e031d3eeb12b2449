"""Choosing the next token from logits: pure functions on float32 [B, V].

Randomness is a key a row, made of (key of the run, row id, position): what a row says
depends neither on the rows beside it nor on the mesh.
"""

import jax
import jax.numpy as jnp


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The likeliest id of each row, int32 [B]; the lowest of equals."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """An id for each row drawn by its key, int32 [B].

    From softmax(logits / temperature), of that the `top_k` likeliest (0: all), of those
    the fewest that hold `top_p` of their probability. Temperature 0 is `greedy`.
    """
    if temperature == 0:
        return greedy(logits_BV)
    # From the maximum down, so that a small temperature gives -inf and never inf - inf.
    logits_BV -= logits_BV.max(axis=-1, keepdims=True)
    kept_BV = keep_top(logits_BV / temperature, top_k=top_k, top_p=top_p)
    return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)


def keep_top(logits_BV: jax.Array, *, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """Logits with -inf for what `top_k`, then `top_p` leave out; the likeliest stays.

    What equals the last one kept is kept as well. Source: arXiv:1904.09751 section 3.1.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if top_p < 1:
        falling_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(falling_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        num_kept_B1 = jnp.sum(before_BV < top_p, axis=-1, keepdims=True)
        last_B1 = jnp.maximum(num_kept_B1, 1) - 1
        least_B1 = jnp.take_along_axis(falling_BV, last_B1, axis=-1)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def row_keys(key: jax.Array, rows_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """The key with which row `rows_B` draws its token at `positions_B`."""
    fold_in = jax.vmap(jax.random.fold_in)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)
    return fold_in(keys_B, positions_B)
