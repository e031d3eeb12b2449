"""The optimizer's state in the host's memory between steps: `optimizer.offload`; and
whether devices can address that memory. `train.turns` has the update of such a state.
"""

import functools

import jax

from jaxinfra.config import ConfigError
from jaxinfra.mesh import HOST
from jaxinfra.train.state import Shardings


def state_on_host(shardings: Shardings) -> Shardings:
    """`shardings` with the optimizer's state in pinned host memory. Raises ConfigError
    where the devices cannot address such memory."""
    place = functools.partial(_on_host, key="optimizer.offload", plain="false")
    return shardings._replace(opt_state=jax.tree.map(place, shardings.opt_state))


def check_activations(mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where the mesh's devices cannot address pinned host memory,
    into which train.remat is to bring activations."""
    _on_host(jax.NamedSharding(mesh, jax.P()), "train.remat", "full")


def _on_host(sharding: jax.NamedSharding, key: str, plain: str) -> jax.NamedSharding:
    try:
        return sharding.with_memory_kind(HOST)
    except ValueError as error:  # the device's own list is in the text
        raise ConfigError(f"{key} offloads: {error}; set {key} to {plain}") from error
