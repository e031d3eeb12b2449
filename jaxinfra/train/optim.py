"""The optimizer and the learning-rate schedule: optax, chosen by name and by kind; the
average of the parameters, and how an update enters them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxinfra
from jaxinfra.config import OptimizerConfig
from jaxinfra.params import Tree

# Kinds that weight decay falls on, and the kind that muon orthogonalises.
DECAYED = ("matrix",)
ORTHOGONALISED = "matrix"
# Dims along which a parameter is many matrices, each updated by itself.
STACKS = ("layers", "experts")


def make_schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> fraction of the peak learning rate, for `steps` in all.

    Warm-up is linear from 1/warmup to 1. wsd: constant, then linear over the
    last `decay_fraction` of all steps. cosine, wsd, linear and exponential come to
    `final_fraction`; inverse_sqrt is sqrt(warmup / step) and knows no end.
    Source: arXiv:1608.03983 eq. 5 (cosine), arXiv:2404.06395 section 4 (wsd),
    arXiv:2502.15938 (linear), arXiv:1910.10683 section 3.1.2 (inverse_sqrt).
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
        case "linear":
            body = optax.linear_schedule(1.0, final, after)
        case "exponential":
            body = optax.exponential_decay(1.0, after, final)
        case "inverse_sqrt":
            flat_steps = max(warmup, 1)
            body = lambda step: jax.lax.rsqrt(1.0 + step / flat_steps)
        case _:
            assert_never(cfg.schedule)
    if not warmup:
        return body
    rising = optax.linear_schedule(1.0 / warmup, 1.0, max(warmup - 1, 1))
    return optax.join_schedules([rising, body], [warmup])


def make_optimizer(
    cfg: OptimizerConfig,
    specs: Tree,
    schedule: optax.Schedule,
    *,
    moments: jnp.dtype = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """The whole update rule, clipping first. `update` takes the keyword `step`.

    It computes in float32 for parameters of any dtype; `moments` is the dtype of its
    state at rest, but for adamw's in 8 bits (`train.adam8`). Source: arXiv:2302.06675
    algorithm 2 (lion); `train.adafactor`.
    """
    decay = optax.add_decayed_weights(
        cfg.weight_decay, mask=jax.tree.map(lambda s: s.kind in DECAYED, specs)
    )
    betas = {"b1": cfg.beta1, "b2": cfg.beta2, "eps": cfg.eps}
    adam = optax.scale_by_adam(**betas)
    if cfg.moments == "8bit":
        adam = jaxinfra.scale_by_adam8(specs, **betas)
    at_rate = scale_at_step(schedule, cfg.learning_rate)
    match cfg.name:
        case "adamw":
            rule = optax.chain(adam, decay, at_rate)
        case "lion":
            lion = optax.scale_by_lion(b1=cfg.beta1, b2=cfg.beta2)
            rule = optax.chain(lion, decay, at_rate)
        case "sgd":
            rule = optax.chain(optax.trace(decay=cfg.momentum), decay, at_rate)
        case "adafactor":
            # By its public name, which loads the module: a plain run needs none of it.
            rule = optax.chain(jaxinfra.adafactor(specs), decay, at_rate)
        case "muon":
            rule = optax.partition(
                {
                    "muon": optax.chain(
                        jaxinfra.orthogonalised_momentum(cfg, specs),
                        optax.add_decayed_weights(cfg.weight_decay),
                        at_rate,
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
    rule = _in_float32(optax.chain(*clip, rule), moments)
    return jaxinfra.averaging(rule, cfg.ema_decay) if cfg.ema_decay else rule


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


class Averaged(NamedTuple):
    """Of an optimizer with an average of the parameters: the state of its rule, and the
    average, float32, a tree like params."""

    rule: Any
    average: Tree


def averaged(opt_state: Any, params: Tree) -> Tree:
    """The parameters to evaluate and to sample with, laid out as `params`: their
    average where the optimizer keeps one, else they themselves.

    Limits: a model state (running statistics) goes with the parameters themselves; the
    average of a run of fewer than 1 / (1 - ema_decay) steps is mostly its start.
    """
    if not isinstance(opt_state, Averaged):
        return params
    return jax.tree.map(
        lambda mean, p: jax.device_put(mean, p.sharding), opt_state.average, params
    )


class Apply(Protocol):
    """How an update enters the parameters."""

    def __call__(self, params: Tree, updates: Tree, key: jax.Array) -> Tree:
        """New parameters of `params`' dtypes from float32 `updates`; `key`: the
        step's."""
        ...


def apply_nearest(params: Tree, updates: Tree, key: jax.Array) -> Tree:
    """params + updates; in bfloat16, what is below half a unit in the last place is
    lost."""
    del key
    return optax.apply_updates(params, updates)


def on_host(
    schedule: optax.Schedule, cfg: OptimizerConfig, steps: int
) -> Callable[[int], float]:
    """Step -> learning rate as a host number, for the metrics; of one table at a time,
    made when it is asked for."""
    size, rates = min(steps + 1, 2**16), jax.jit(jax.vmap(schedule))

    @functools.lru_cache(maxsize=1)
    def table(number: int) -> np.ndarray:
        return np.asarray(rates(number * size + np.arange(size)))

    return lambda step: float(cfg.learning_rate * table(step // size)[step % size])


def _in_float32(tx: optax.GradientTransformationExtraArgs, moments: jnp.dtype):
    """`tx` with all that it reads made float32, and its state kept in `moments`."""

    def cast(tree, dtype):
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            tree,
        )

    def init(params):
        return cast(tx.init(cast(params, jnp.float32)), moments)

    def update(updates, state, params=None, **extra):
        wide = [cast(tree, jnp.float32) for tree in (updates, state, params)]
        updates, state = tx.update(*wide, **extra)
        return updates, cast(state, moments)

    return optax.GradientTransformationExtraArgs(init, update)
