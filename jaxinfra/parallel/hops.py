"""What goes from stage to stage within a step: to the next, to the partner, to all.

Inside the executor's shard_map, by all stages at once.
"""

import jax
import jax.numpy as jnp

from jaxinfra import mesh
from jaxinfra.params import Tree


def to_all(x: jax.Array, is_source) -> jax.Array:
    """`x` of the one stage that is the source, on every stage."""
    # XLA's CPU backend aborts on a bfloat16 sum in a region that is manual in part.
    dtype = jnp.float32 if mesh.platform() == "cpu" else x.dtype
    own = jnp.where(is_source, x, 0).astype(dtype)
    return jax.lax.psum(own, "pipeline").astype(x.dtype)


def to_next(x: jax.Array, stages: int, *, by: int = 1) -> jax.Array:
    """`x` of the stage that is `by` before, round the ring of all."""
    pairs = [(stage, (stage + by) % stages) for stage in range(stages)]
    return jax.lax.ppermute(x, "pipeline", pairs)


def to_partner(tree: Tree, stages: int) -> Tree:
    """`tree` of the partner, as `schedules.balanced` has them."""
    pairs = [(stage, stages - 1 - stage) for stage in range(stages)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "pipeline", pairs), tree)
