"""What layers of experts told: a part of the loss, metrics, the next router biases.

The biases are model state, {"router_bias": float32 [L, E]}: no gradient reaches them,
and `update_state` moves them once a step by the step's whole load, so that microbatches
and devices change nothing. They are there where train.router_bias_rate is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.config import Config, ModelConfig
from jaxinfra.ops import experts
from jaxinfra.ops.experts import Told

BIAS = "router_bias"


class Summed(NamedTuple):
    """loss: float32, to be added to the loss sum in training. metrics and stats: of
    `objective.Aux`."""

    loss: jax.Array
    metrics: dict[str, jax.Array]
    stats: Any


class Routers:
    """The routers of a model, as its loss and its model state see them."""

    def __init__(self, config: Config):
        self._model, self._train = config.model, config.train

    def summed(self, told: Any) -> Summed:
        """The sums over rows, of what `Model.forward` gives without caches; losses are
        summed over layers and metrics are means over them."""
        layers = _by_layer(told, self._model)
        totals = {
            name: sum(jnp.sum(getattr(each, f"{name}_B")) for _, each in layers)
            for name in ("balance", "z", "entropy", "dropped", "busiest")
        }
        loss = self._train.balance_loss * totals["balance"]
        loss += self._train.router_z_loss * totals["z"]
        num_layers = sum(len(numbers) for numbers, _ in layers)
        metrics = {f"router_{name}": x / num_layers for name, x in totals.items()}
        if not self._train.router_bias_rate:
            return Summed(loss, metrics, ())
        load_LE = jnp.zeros((self._model.num_layers, self._model.num_experts))
        for numbers, each in layers:
            load_LE = load_LE.at[numbers].set(jnp.sum(each.load_BE, axis=1))
        return Summed(loss, metrics, {BIAS: load_LE})

    def first_state(self) -> Any:
        """The model state before the first step."""
        if not self._train.router_bias_rate:
            return ()
        return {BIAS: jnp.zeros((self._model.num_layers, self._model.num_experts))}

    def biases(self, model_state: Any) -> dict[str, jax.Array]:
        """What a model needs beside its parameters, from the state of a run; it may be
        within that of something else."""
        while hasattr(model_state, "inner"):
            model_state = model_state.inner
        return model_state or {}

    def update_state(self, model_state: Any, stats: Any) -> Any:
        """The next model state, by a step's whole load."""
        if not self._train.router_bias_rate:
            return model_state
        moved = experts.moved_bias(
            model_state[BIAS], stats[BIAS], rate=self._train.router_bias_rate
        )
        return {BIAS: moved}


def _by_layer(told: Any, cfg: ModelConfig) -> list[tuple[np.ndarray, Told]]:
    """(numbers of layers, what they told along a first dim), for layers of experts."""
    first, size = len(cfg.prefix), len(cfg.pattern)
    alone = [(i, x) for i, x in enumerate(told["prefix"])]
    alone += [(first + size * cfg.repeats + i, x) for i, x in enumerate(told["suffix"])]
    found = [
        (np.array([number]), jax.tree.map(lambda x: x[None], x))
        for number, x in alone
        if x is not None
    ]
    repeated = first + size * np.arange(cfg.repeats)
    pattern = told["pattern"] if cfg.repeats else []
    found += [(repeated + i, x) for i, x in enumerate(pattern) if x is not None]
    return found
