"""Batch normalisation that no mesh and no microbatch can change: by running statistics.

A step normalises by the statistics of the steps before it, which stand in the model
state, and collects count, sum and sum of squares of what it saw; sums merge in any
order, and `updated` makes the next statistics of them. Every row passes by itself, so
that dropout by row ids works beside it. Modules for linen and for nnx;
`interop.flax_bridge` carries the sums.

Against BatchNorm: statistics lag a step, and no gradient flows through them, so nothing
holds the scale of the weights before it but weight decay; train with some, and with a
warm-up. Sources: arXiv:1502.03167 section 2 (why a gradient that ignores them needs
care), arXiv:1702.03275 (running statistics in training).

Limits: the statistics are of the parameters that are trained. Under
optimizer.ema_decay the average of the parameters is evaluated with these.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

Tree = Any

STATS, SUMS = "running_stats", "running_sums"  # linen's collections
_SUM_NAMES = {"count", "total", "squares"}


class RunningStat(nnx.Variable):
    """A running statistic of a `NnxRunningNorm`, in the model state."""


class RunningSum(nnx.Variable):
    """What a call of a `NnxRunningNorm` saw; no state."""


class LinenRunningNorm(nn.Module):
    """(x - mean) / sqrt(var + eps), by feature (the last dim), then scale and bias.

    momentum: the part of the statistics that a step keeps, from 0 to below 1, else
    ValueError; the first steps weigh alike, as if there had been none before. Sums are
    collected where the collection `running_sums` is mutable, which `from_linen` makes
    it in training.
    """

    momentum: float = 0.9
    eps: float = 1e-5

    def __post_init__(self):
        _check(self.momentum)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1]
        first = _first(size, self.momentum)
        stats = {
            name: self.variable(STATS, name, lambda value=value: value).value
            for name, value in first.items()
        }
        scale = self.param("scale", nn.initializers.ones, (size,))
        bias = self.param("bias", nn.initializers.zeros, (size,))
        if self.is_mutable_collection(SUMS) and not self.is_initializing():
            for name, value in sums(x, stats["mean"]).items():
                total = self.variable(SUMS, name, jnp.zeros_like, value)
                total.value += value
        return normalised(x, stats, scale, bias, eps=self.eps)


class NnxRunningNorm(nnx.Module):
    """As `LinenRunningNorm`, of `num_features`; collects between `module.train()` and
    `module.eval()`. `rngs` is not used: layers of nnx take one."""

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        eps: float = 1e-5,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        _check(momentum)
        self.eps = eps
        self.use_running_average = True
        for name, value in _first(num_features, momentum).items():
            setattr(self, name, RunningStat(value))
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.count = RunningSum(jnp.zeros(()))
        self.total = RunningSum(jnp.zeros(num_features))
        self.squares = RunningSum(jnp.zeros(num_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        stats = {"mean": self.mean[...], "var": self.var[...]}
        if not self.use_running_average:
            for name, value in sums(x, stats["mean"]).items():
                total = getattr(self, name)
                total[...] = total[...] + value
        return normalised(x, stats, self.scale[...], self.bias[...], eps=self.eps)


def normalised(
    x: jax.Array, stats: dict, scale: jax.Array, bias: jax.Array, *, eps: float
) -> jax.Array:
    """`x` by `stats`, of which no gradient flows; computed in float32, in x's dtype."""
    mean, var = map(jax.lax.stop_gradient, (stats["mean"], stats["var"]))
    y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + eps) * scale + bias
    return y.astype(x.dtype)


def sums(x: jax.Array, mean: jax.Array) -> dict[str, jax.Array]:
    """Count, sum and sum of squares of every feature's distance from `mean`: from the
    running mean, so that no large squares cancel. float32, scalar and [features]."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32).reshape(-1, x.shape[-1]) - mean
    total, squares = jnp.sum(x, axis=0), jnp.sum(x * x, axis=0)
    return {"count": jnp.float32(x.shape[0]), "total": total, "squares": squares}


def updated(state: Tree, seen: Tree) -> Tree:
    """`state`, nested dicts with the statistics of layers in it, after a step whose
    sums are `seen`, at the same paths."""
    if set(seen) == _SUM_NAMES:
        return _updated(state, **seen)
    return state | {name: updated(state[name], seen[name]) for name in seen}


def _check(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(
            f"momentum={momentum} of a running norm must be at least 0 and below 1: "
            "with 1 its statistics would never come to be"
        )


def _first(size: int, momentum: float) -> dict[str, jax.Array]:
    """Statistics before the first step. weight: 1 - momentum**steps, which all updates
    so far have; the momentum stands beside it, for `updated` sees no module."""
    return {
        "mean": jnp.zeros(size),
        "var": jnp.ones(size),
        "weight": jnp.zeros(()),
        "momentum": jnp.float32(momentum),
    }


def _updated(state: Tree, *, count, total, squares) -> Tree:
    count = jnp.maximum(count, 1.0)
    moved = total / count
    var = jnp.maximum(squares / count - moved**2, 0.0)
    weight = state["momentum"] * state["weight"] + (1 - state["momentum"])
    rate = (1 - state["momentum"]) / weight
    return state | {
        "mean": state["mean"] + rate * moved,
        "var": state["var"] + rate * (var - state["var"]),
        "weight": weight,
    }
