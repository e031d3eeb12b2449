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
_FIGURES = ("balance", "z", "entropy", "dropped", "busiest")


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
        parts = [self.of_layers(each, numbers) for numbers, each in layers]
        return jax.tree.map(lambda *each: sum(each), *parts)

    def of_layers(self, told: Told, numbers: Any) -> Summed:
        """The part of layers of these numbers: an array of them, told having a first
        dim for it, or one number. They may be traced."""
        sums = {name: jnp.sum(getattr(told, f"{name}_B")) for name in _FIGURES}
        loss = self._train.balance_loss * sums["balance"]
        loss += self._train.router_z_loss * sums["z"]
        kinds = [layer.feed_forward for layer in self._model.layers]
        metrics = {
            f"router_{name}": x / kinds.count("experts") for name, x in sums.items()
        }
        load_E = jnp.sum(told.load_BE, axis=-2)
        stats = jax.tree.map(
            lambda zero_LE: zero_LE.at[numbers].set(load_E), self.first_state()
        )
        return Summed(loss, metrics, stats)

    def nothing(self) -> Summed:
        """The sums over no layers."""
        zero = jnp.float32(0)
        metrics = {f"router_{name}": zero for name in _FIGURES}
        return Summed(zero, metrics, self.first_state())

    def with_gradient(self, y_BTD: jax.Array, loss: jax.Array, scale: Any) -> jax.Array:
        """`y_BTD`, to whose pull-back that of `scale` x `loss` is added."""
        return _with_gradient(y_BTD, loss, scale)

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


@jax.custom_vjp
def _with_gradient(y_BTD, loss, scale):
    return y_BTD


def _with_gradient_forward(y_BTD, loss, scale):
    return y_BTD, scale


def _with_gradient_back(scale, dy_BTD):
    return dy_BTD, scale, jnp.zeros_like(scale)


_with_gradient.defvjp(_with_gradient_forward, _with_gradient_back)


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
