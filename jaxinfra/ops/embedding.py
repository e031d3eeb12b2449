"""Token embedding on a table that is split over vocabulary and width."""

import functools

import jax
import jax.numpy as jnp

from jaxinfra import sharding
from jaxinfra.precision import Policy
from jaxinfra.sharding import Axes, Rules


def embed(
    table_VD: jax.Array, tokens_BT: jax.Array, *, policy: Policy, rules: Rules
) -> jax.Array:
    """Rows of `table_VD` for `tokens_BT` (any integer dtype), in compute dtype.

    Each device looks up the ids of its own part of the vocabulary and the parts are
    summed: a plain gather on such a table makes the partitioner replicate the result.
    The table is gathered in its own dtype, so its gradient is summed in that.
    """
    table_spec = jax.typeof(table_VD).sharding.spec
    lookup = jax.shard_map(
        functools.partial(_lookup, table_spec=table_spec, axes=rules.vocab),
        in_specs=(table_spec, sharding.spec(rules, "batch", "length")),
        out_specs=sharding.spec(rules, "batch", "length", "width"),
    )
    return lookup(table_VD, tokens_BT).astype(policy.compute)


def _lookup(
    table_VD: jax.Array,
    tokens_BT: jax.Array,
    *,
    table_spec: jax.sharding.PartitionSpec,
    axes: Axes,
) -> jax.Array:
    """Embedding of the ids that this device holds, zero for others; then the sum."""
    table_VD = sharding.all_gather(table_VD, table_spec)
    start = jax.lax.axis_index(axes) * table_VD.shape[0]
    own_BT = tokens_BT.astype(jnp.int32) - start
    is_own_BT = (own_BT >= 0) & (own_BT < table_VD.shape[0])
    x_BTD = table_VD[jnp.where(is_own_BT, own_BT, 0)]
    return jax.lax.psum(jnp.where(is_own_BT[..., None], x_BTD, 0), axes)


def position_rows(
    table_PD: jax.Array, positions_BT: jax.Array, *, policy: Policy, rules: Rules
) -> jax.Array:
    """Rows of a learned position table, which no axis but fsdp splits."""
    table_PD = jax.reshard(
        table_PD, sharding.gathered(jax.typeof(table_PD).sharding.spec)
    )
    out_spec = sharding.spec(rules, "batch", "length", "width")
    return table_PD.at[positions_BT].get(out_sharding=out_spec).astype(policy.compute)
