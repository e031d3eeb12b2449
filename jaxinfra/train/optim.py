"""The optimizer and the learning-rate schedule: optax, chosen by name and by kind."""

import math
from collections.abc import Callable
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfra.config import OptimizerConfig
from jaxinfra.params import ParamSpec, Tree

# Kinds that weight decay falls on, and the kind that muon orthogonalises.
DECAYED = ("matrix",)
ORTHOGONALISED = "matrix"


def make_schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> fraction of the peak learning rate, for `steps` in all.

    Warm-up is linear from 1/warmup to 1. wsd: constant, then linear over the
    last `decay_fraction` of all steps.
    Source: arXiv:1608.03983 eq. 5 (cosine), arXiv:2404.06395 section 4 (wsd).
    """
    warmup, final = cfg.warmup_steps, cfg.final_fraction
    after = max(steps - warmup, 1)
    match cfg.schedule:
        case "constant":
            body = optax.constant_schedule(1.0)
        case "cosine":
            body = optax.cosine_decay_schedule(1.0, after, alpha=final)
        case "wsd":
            fall = min(max(round(cfg.decay_fraction * steps), 1), after)
            falling = optax.linear_schedule(1.0, final, fall)
            flat = optax.constant_schedule(1.0)
            body = optax.join_schedules([flat, falling], [after - fall])
        case _:
            assert_never(cfg.schedule)
    if not warmup:
        return body
    rising = optax.linear_schedule(1.0 / warmup, 1.0, max(warmup - 1, 1))
    return optax.join_schedules([rising, body], [warmup])


def make_optimizer(
    cfg: OptimizerConfig, specs: Tree, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """The whole update rule, clipping first. `update` takes the keyword `step`."""
    decay = optax.add_decayed_weights(
        cfg.weight_decay, mask=jax.tree.map(lambda s: s.kind in DECAYED, specs)
    )
    adam = optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps)
    match cfg.name:
        case "adamw":
            rule = optax.chain(adam, decay, scale_at_step(schedule, cfg.learning_rate))
        case "muon":
            rule = optax.partition(
                {
                    "muon": optax.chain(
                        _orthogonalised_momentum(cfg, specs),
                        optax.add_decayed_weights(cfg.weight_decay),
                        scale_at_step(schedule, cfg.learning_rate),
                    ),
                    "adam": optax.chain(
                        adam, scale_at_step(schedule, cfg.adam_learning_rate)
                    ),
                },
                jax.tree.map(
                    lambda s: "muon" if s.kind == ORTHOGONALISED else "adam", specs
                ),
            )
        case _:
            assert_never(cfg.name)
    clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    return optax.chain(*clip, rule)


def scale_at_step(
    schedule: optax.Schedule, peak: float
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by -peak * schedule(step): the run's step, which counts skipped
    updates too, and not the number of updates made."""

    def update(updates, state, params=None, *, step, **unused):
        # An array always: a constant schedule gives a float.
        scale = jnp.asarray(-peak * schedule(step))
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def on_host(
    schedule: optax.Schedule, cfg: OptimizerConfig, steps: int
) -> Callable[[int], float]:
    """Step -> learning rate as a host number, for the metrics: one table, made once."""
    table = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(steps + 1)))
    return lambda step: float(cfg.learning_rate * table[step])


def _orthogonalised_momentum(cfg: OptimizerConfig, specs: Tree):
    """Muon's direction for every stacked matrix, layer by layer.

    The contracted dims of the spec are one side of the matrix, the rest the other,
    layers a batch; scaled by sqrt(max(1, outputs / inputs)), so that a wide layer moves
    as far. Source: optax.contrib.muon, whose parts these are.
    """

    def sides(spec: ParamSpec) -> optax.contrib.MuonDimensionNumbers:
        outputs = (
            dim
            for dim, name in enumerate(spec.axes)
            if dim not in spec.contract and name != "layers"
        )
        return optax.contrib.MuonDimensionNumbers(spec.contract, tuple(outputs))

    def scale(spec: ParamSpec) -> float:
        inputs, outputs = (
            math.prod(spec.shape[dim] for dim in dims) for dims in sides(spec)
        )
        return math.sqrt(max(1.0, outputs / inputs))

    def matrices(of):
        return jax.tree.map(
            lambda s: of(s) if s.kind == ORTHOGONALISED else optax.MaskedNode(), specs
        )

    momentum = optax.contrib.scale_by_muon(
        beta=cfg.momentum,
        # One step fewer than from the Frobenius norm. Source: arXiv:2512.04632.
        ns_steps=4,
        preconditioning="aol",
        mu_dtype=jnp.float32,
        weight_dimension_numbers=lambda _: matrices(sides),
    )
    by_shape = optax.stateless(
        lambda updates, params: jax.tree.map(jnp.multiply, updates, matrices(scale))
    )
    return optax.chain(momentum, by_shape)
