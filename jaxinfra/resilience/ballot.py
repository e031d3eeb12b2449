"""Agreement of all processes, once a step, on whether to stop after it.

Each process votes with its step; the sum is a tiny program on the devices, queued like
the step itself, so every process reads the same answer for the same step and nobody
waits for a message.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def make_ballot(mesh: jax.sharding.Mesh) -> Callable[[bool], Any]:
    """ballot(wants) -> whether any process wants; a device value where there are
    several processes, to be read later."""
    if jax.process_count() == 1:
        return lambda wants: wants
    votes = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    count = jax.jit(jnp.max, out_shardings=jax.NamedSharding(mesh, jax.P()))

    def ballot(wants: bool) -> jax.Array:
        mine = np.full((1,), wants, np.int32)
        shape = (mesh.size,)
        return count(jax.make_array_from_callback(shape, votes, lambda index: mine))

    return ballot
