"""Small convolutional networks with statistics of batches, in linen and in nnx, and one
way to train them on any mesh; the loss is of 12 images of 6 x 6.

No bias stands before a norm: its gradient is 0, and adam would make a full step of the
rounding error."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxinfra import mesh as mesh_lib
from jaxinfra import sharding
from jaxinfra.interop import flax_bridge, running_norm
from jaxinfra.train import accumulation, objective
from jaxinfra.train import state as state_lib
from jaxinfra.train import step as step_lib

# Optimising these programs takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0}
B, SIDE, FEATURES, CLASSES = 12, 6, 4, 3
TX = optax.adamw(1e-2)
MESHES = {"one": {}, "four": {"data": 2, "fsdp": 2}}


class LinenNet(nn.Module):
    norm: str
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, is_training):
        x = nn.Conv(FEATURES, (3, 3), use_bias=False)(x)
        if self.norm == "batch":
            x = nn.BatchNorm(use_running_average=not is_training, momentum=0.8)(x)
        else:
            x = running_norm.LinenRunningNorm(momentum=0.8)(x)
        x = nn.relu(x).mean(axis=(1, 2))
        x = nn.Dropout(self.rate, deterministic=not is_training)(x)
        return nn.Dense(CLASSES)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs, *, norm, rate=0.0):
        self.conv = nnx.Conv(1, FEATURES, (3, 3), use_bias=False, rngs=rngs)
        if norm == "batch":
            self.norm = nnx.BatchNorm(FEATURES, momentum=0.8, rngs=rngs)
        else:
            self.norm = running_norm.NnxRunningNorm(FEATURES, momentum=0.8)
        self.dropout = nnx.Dropout(rate, rngs=rngs) if rate else lambda x: x
        self.head = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))
        return self.head(self.dropout(x))


def linen_loss(model, batch, is_training):
    return losses(model(batch["image"], is_training), batch)


def nnx_loss(model, batch, is_training):
    del is_training
    return losses(model(batch["image"]), batch)


def losses(logits, batch):
    """(losses, weights, metrics)."""
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    is_right = jnp.argmax(logits, axis=-1) == batch["label"]
    return ce, batch["weight"], {"accuracy": is_right}


def bridged(kind, *, norm="batch", rate=0.0):
    settings = {"rows": (lambda batch: batch["row"]) if rate else None}
    settings["batch_stats"] = "per_microbatch" if norm == "batch" else None
    if kind == "linen":
        return flax_bridge.from_linen(LinenNet(norm, rate), linen_loss, **settings)
    return flax_bridge.from_nnx(
        lambda rngs: NnxNet(rngs, norm=norm, rate=rate), nnx_loss, **settings
    )


def make_batch(seed=0, rules=None):
    rng = np.random.default_rng(seed)
    batch = {
        "image": 3 + 2 * rng.normal(size=(B, SIDE, SIDE, 1)).astype(np.float32),
        "label": rng.integers(0, CLASSES, B),
        "weight": rng.integers(1, 3, B).astype(np.float32),
        "row": np.arange(B, dtype=np.uint32),
    }
    batch["image"] += 3 * batch["label"][:, None, None, None]
    if rules is None:
        return batch
    place = sharding.spec(rules, "batch")
    return jax.tree.map(lambda x: jax.device_put(x, place), batch)


@functools.cache
def train(kind, *, norm="batch", rate=0.4, mesh="one", micro=1, steps=5, spoilt=()):
    """(metrics of every step, the last state on the host, first state on the host);
    the images of the `spoilt` steps are not numbers. Each run is made once."""
    bridge, sizes = bridged(kind, norm=norm, rate=rate), MESHES[mesh]
    count = int(np.prod(list(sizes.values())))
    mesh = mesh_lib.make_mesh(sizes, devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        layout = sharding.make_layout(mesh)
        tx = optax.with_extra_args_support(TX)
        key = jax.random.key(0)
        params, model_state = jax.jit(bridge.init)(key, make_batch(0, layout.params))
        places = flax_bridge.shardings_for(params, tx, layout)
        params = jax.device_put(params, places.params)
        grad_fn = accumulation.accumulate(
            objective.grad_of(bridge.loss_fn), micro, shardings=places.grads
        )
        step = step_lib.make_train_step(
            grad_fn, tx, shardings=places, update_state=bridge.update_state
        )
        step = jax.jit(step, compiler_options=QUICK)
        opt_state = state_lib.init_opt_state(tx, params, places)
        key = jax.random.key_data(jax.random.key(1))
        state = state_lib.TrainState(jnp.int32(0), params, opt_state, model_state, key)
        first, metrics = jax.device_get(state), []
        for k in range(steps):
            batch = make_batch(k, layout.params)
            if k in spoilt:
                batch["image"] = batch["image"] * jnp.nan
            state, values = step(state, batch)
            metrics.append(jax.device_get(values))
        return metrics, jax.device_get(state), first
