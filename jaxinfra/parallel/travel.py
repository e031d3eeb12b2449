"""Stacked layers travel from where they are at rest to their stages, and back.

Inside the executor's shard_map; `placement` says by which rounds.
"""

import jax
import jax.numpy as jnp

from jaxinfra.parallel.chunks import zeros_like
from jaxinfra.parallel.placement import Placement


def to_chunks(w: jax.Array, *, placed: Placement) -> jax.Array:
    """A stage's rows of a stacked parameter, from where they are at rest."""
    return _travel(w, placed, rows=placed.rows, is_back=False)


def to_rest(g: jax.Array, *, placed: Placement) -> jax.Array:
    """Of the gradient of those rows: back to where the parameter is at rest."""
    return _travel(g, placed, rows=placed.at_rest, is_back=True)


def _travel(w, placed: Placement, *, rows: int, is_back: bool):
    """By rounds, in each of which a stage sends a block and gets one."""
    if not placed.rounds:
        return w
    stage, block = jax.lax.axis_index("pipeline"), placed.block
    like = jax.typeof(w)
    out = zeros_like(like.update(shape=(rows + block, *like.shape[1:])))
    for pairs, send, put in placed.rounds:
        if is_back:
            pairs, send, put = [(b, a) for a, b in pairs], put, send
        start, end = (jnp.asarray(at)[stage] * block for at in (send, put))
        own = jax.lax.dynamic_slice_in_dim(w, start, block)
        came = jax.lax.ppermute(own, "pipeline", pairs)
        out = jax.lax.dynamic_update_slice_in_dim(out, came, end, axis=0)
    return out[:rows]
