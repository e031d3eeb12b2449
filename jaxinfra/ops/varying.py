"""Inside a shard_map: between which devices a value differs, as its type says."""

import jax


def varies_over(local: jax.Array) -> frozenset[str]:
    """The mesh axes between whose devices `local` may differ."""
    return jax.typeof(local).manual_axis_type.varying


def varying_like(local: jax.Array, *others: jax.Array) -> jax.Array:
    """`local`, said to differ wherever one of `others` does."""
    missing = frozenset().union(*map(varies_over, others)) - varies_over(local)
    return jax.lax.pcast(local, tuple(missing), to="varying") if missing else local
