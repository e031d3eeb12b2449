"""What a device of the axis `context` has of each row, inside a `shard_map`.

Rows are in `context.row_order`: device i of P has chunks i and 2 P - 1 - i.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxinfra.parallel.meeting import Keys, Queries


class Settings(NamedTuple):
    """How every meeting of queries and keys is computed."""

    window: int
    softcap: float
    kernel: str


def whole(q_BTKGH, k_BSKH, v_BSKH, segments_BT, result):
    """(The result, residuals). What the backward pass reads of the whole is named for
    remat, so that none of its parts need be kept, or made again."""
    out_BTKGH = checkpoint_name(result.out_BTKGH.astype(q_BTKGH.dtype), "attention")
    log_sum_BTKG = checkpoint_name(result.log_sum_BTKG, "attention")
    residuals = (q_BTKGH, k_BSKH, v_BSKH, segments_BT, out_BTKGH, log_sum_BTKG)
    return out_BTKGH, residuals


def own(q_BTKGH, k_BSKH, v_BSKH, segments_BT) -> tuple[Queries, Keys]:
    """What this device has, with the place of each token in its row."""
    P, here = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    size = q_BTKGH.shape[1] // 2
    places_T = jnp.arange(size, dtype=jnp.int32)
    places_T = jnp.concatenate(
        [here * size + places_T, (2 * P - 1 - here) * size + places_T]
    )
    return (
        Queries(q_BTKGH, places_T, segments_BT),
        Keys(k_BSKH, v_BSKH, places_T, segments_BT),
    )
