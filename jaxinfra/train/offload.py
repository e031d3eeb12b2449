"""The optimizer's state in the host's memory between steps: `optimizer.offload`; and
whether devices can address that memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxinfra.config import ConfigError
from jaxinfra.mesh import HOST
from jaxinfra.train.state import Shardings


def offloaded(train_step: Callable, shardings: Shardings) -> tuple[Callable, Shardings]:
    """`train_step` of a state whose optimizer state rests in pinned host memory, and
    where that state's arrays are.

    The compiler brings each array in where the update first reads it and sends it back
    where it was last written: the same numbers, and the device's memory is free of it
    during the forward and backward passes. Raises ConfigError where the devices cannot
    address such memory.
    """

    def step(state: Any, batch: Any) -> Any:
        near = jax.device_put(state.opt_state, jax.memory.Space.Device)
        state, metrics = train_step(state._replace(opt_state=near), batch)
        far = jax.device_put(state.opt_state, jax.memory.Space.Host)
        return state._replace(opt_state=far), metrics

    on_host = functools.partial(_on_host, key="optimizer.offload", plain="false")
    return step, shardings._replace(
        opt_state=jax.tree.map(on_host, shardings.opt_state)
    )


def check_activations(mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where the mesh's devices cannot address pinned host memory,
    into which train.remat is to bring activations."""
    _on_host(jax.NamedSharding(mesh, jax.P()), "train.remat", "full")


def _on_host(sharding: jax.NamedSharding, key: str, plain: str) -> jax.NamedSharding:
    try:
        return sharding.with_memory_kind(HOST)
    except ValueError as error:  # the device's own list is in the text
        raise ConfigError(f"{key} offloads: {error}; set {key} to {plain}") from error
