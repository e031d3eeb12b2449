"""FLOPs of the matmuls of a compiled program, loops multiplied out and each branch
weighted by how often it is taken: `jaxinfra.plan.cost`, of work alone."""

import math
from collections.abc import Mapping

from jaxinfra.plan import cost, program, work


def matmul_flops(text: str, shares: Mapping[str, float]) -> float:
    """Of one device. shares: scope -> part of the loop's turns in which the branch of a
    conditional directly in that `jax.named_scope` is taken; others count as their
    dearest branch, always taken."""
    taken = {}
    for scope, share in shares.items():
        parts = (1 - share, share)
        taken[f"/{scope}"] = cost.Share(parts, parts)
    played = cost.play(
        program.parse(text),
        clock=work.matmul_flops,  # so that the dearest is the one with most FLOPs
        link_bytes_per_sec=math.inf,
        shares=taken,
    )
    return played.matmul_flops
