"""The gradient of one batch, on one device and through a pipeline, side by side."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra import experiment as experiments
from jaxinfra import mesh, options, params, precision, sharding
from jaxinfra.config import (
    Config,
    LayerConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from jaxinfra.train import objective

ROWS, LENGTH, VOCAB = 8, 24, 61  # all dims of the model differ too
QUICK = {"xla_backend_optimization_level": 0}

# Every feature of a stack that a chunk must get right, at once.
ODD = {
    "prefix": (LayerConfig(window=3),),
    "pattern": (LayerConfig(), LayerConfig(window=4)),
    "repeats": 3,
    "suffix": (LayerConfig(rope_theta=500.0),),
    "tied": False,
    "dropout": 0.3,
    "qk_norm": "head",
}
# Experts in the repeats alone, and in all groups beside layers without them.
EXPERTS = {
    "pattern": (LayerConfig(feed_forward="experts"),),
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_ffn_width": 20,
}
ODD_EXPERTS = (
    ODD
    | EXPERTS
    | {
        "prefix": (LayerConfig(), LayerConfig(feed_forward="experts")),
        "pattern": (LayerConfig(), LayerConfig(window=4, feed_forward="experts")),
        "suffix": (LayerConfig(feed_forward="experts"),),
        "router": "sigmoid",
        "shared_experts": 1,
    }
)


def config(
    sizes: dict[str, int],
    *,
    schedule: str = "1f1b",
    virtual: int = 1,
    microbatches: int = 4,
    zero: int = -1,
    precision_name: str = "float32",
    model: dict[str, Any] | None = None,
    way: str = "ring",
    experts: str = "dropless",
    recompute: bool = False,
    balanced: str = "true",
    rows: int = ROWS,
    **train: Any,
) -> Config:
    """A tiny model on this mesh, its vocabulary prime."""
    whole = {"width": 16, "ffn_width": 24, "num_heads": 4, "num_kv_heads": 2}
    whole |= {"repeats": 4, "vocab_size": VOCAB} | (model or {})
    return dataclasses.replace(
        options.load_config("tiny"),
        model=ModelConfig(**whole),
        train=TrainConfig(
            steps=10,
            batch_size=rows,
            length=LENGTH,
            microbatches=microbatches,
            **train,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        mesh=MeshConfig(**{"data": 1, **sizes}),
        parallel=ParallelConfig(
            schedule=schedule,
            virtual_stages=virtual,
            context=way,
            experts=experts,
            recompute=recompute,
            balanced=balanced,
        ),
        precision=precision_name,
        zero=zero,
    )


def build(config: Config) -> experiments.Experiment:
    count = int(np.prod(list(dataclasses.asdict(config.mesh).values())))
    resolved = experiments.resolve(config, VOCAB)
    return experiments.build(resolved, jax.devices()[:count])


def rows(built: experiments.Experiment, seed: int = 0) -> objective.Rows:
    """Rows of several documents and padding, whose weights differ from row to row."""
    rng = np.random.default_rng(seed)
    count = built.config.train.batch_size
    shape = (count, LENGTH + 1)
    segments = np.sort(rng.integers(0, 3, shape), axis=1)[:, ::-1]
    segments = np.where(segments == 0, 0, 3 - segments)
    segments[0] = 1
    put = lambda x: jax.device_put(x, experiments.batch_sharding(built.layout))
    return objective.Rows(
        put(rng.integers(0, VOCAB, shape).astype(np.int32)),
        put(segments.astype(np.int32)),
        put(np.arange(count, dtype=np.uint32)),
        put(np.broadcast_to(np.arange(count, dtype=np.float32)[:, None], shape)),
    )


def serial(config: Config) -> Config:
    """The same, on one device, in one piece."""
    return dataclasses.replace(
        config,
        mesh=MeshConfig(data=1),
        parallel=ParallelConfig(experts=config.parallel.experts),
        train=dataclasses.replace(config.train, microbatches=1),
    )


def first_params(built: experiments.Experiment) -> Any:
    """On the host, without padding; the same on every mesh."""
    one = mesh.make_mesh({}, devices=jax.devices()[:1])
    with jax.set_mesh(one):
        weights = params.initialize(
            built.model.specs,
            jax.random.key(0),
            layout=sharding.make_layout(one),
            dtype=precision.policy("float32").param,
        )
    return jax.device_get(weights)


def placed(built: experiments.Experiment, weights: Any) -> Any:
    """These parameters where `built` has them."""

    def place(x, like):
        pad = [(0, big - small) for big, small in zip(like.shape, x.shape, strict=True)]
        return jax.device_put(np.pad(x, pad).astype(like.dtype), like.sharding)

    return jax.tree.map(place, weights, built.abstract().params)


def gradients(config: Config, weights: Any = None) -> tuple[Any, Any, Any]:
    """(Gradients of one batch, loss by the LossFn of evaluation, the parameters), on
    the host, without padding."""
    built = build(config)
    weights = first_params(built) if weights is None else weights
    task = built.task
    grad_fn = task.grad_fn or objective.grad_of(task.loss_fn)
    train = config.train
    in_training = (train.label_smoothing, train.balance_loss, train.router_z_loss)
    is_random = config.model.dropout > 0 or any(in_training)
    key = jax.random.key(5) if is_random else None
    jitted = functools.partial(jax.jit, compiler_options=QUICK)
    with jax.set_mesh(built.layout.mesh):
        here, batch, state = placed(built, weights), rows(built), task.model_state()
        state = jax.tree.map(lambda x: x + 0.02 * jnp.arange(x.shape[-1]), state)
        made = jitted(grad_fn)(here, state, batch, key)
        held_out = jitted(task.loss_fn)(here, state, batch, None)
        made, held_out = jax.device_get((made, held_out))
    cut = lambda g, w: g[tuple(map(slice, w.shape))]
    return (
        made._replace(grads=jax.tree.map(cut, made.grads, weights)),
        held_out,
        weights,
    )


# Of the whole gradient's norm: below it a tensor's gradient is rounding alone, as that
# of a key bias without rotary positions, which softmax does not see.
NOISE = 1e-6


def distance(found: Any, expected: Any) -> dict[str, float]:
    """||g - g0|| / ||g0|| of every parameter, by path; where g0 is noise, 0 if g is."""
    whole = np.sqrt(sum(np.sum(g0**2) for g0 in jax.tree.leaves(expected)))

    def one(g, g0):
        if np.linalg.norm(g0) < NOISE * whole:
            return 0.0 if np.linalg.norm(g) < NOISE * whole else np.inf
        return float(np.linalg.norm(g - g0) / np.linalg.norm(g0))

    return dict(params.named(jax.tree.map(one, found, expected)))
