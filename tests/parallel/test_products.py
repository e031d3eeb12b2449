"""Loss and every gradient on products of mesh axes, against one device: dense models
and models with experts, with rows of documents whose length may be split."""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest

from jaxinfra import experiment
from jaxinfra.config import (
    Config,
    DataConfig,
    LayerConfig,
    MeshConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)
from jaxinfra.data import packing
from jaxinfra.train import accumulation, objective

LOSS = 1e-5  # float32 sums in another order, of a loss about 3
GRADIENT = 1e-4  # the same, relative to the norm of each array's gradient
# Optimising these programs takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0}
V, B, T = 19, 8, 16
DENSE = ModelConfig(
    vocab_size=V,
    width=16,
    ffn_width=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    pattern=(LayerConfig(window=5), LayerConfig()),
    repeats=1,
    tied=False,
    dropout=0.1,
)
MIXTURE = dataclasses.replace(
    DENSE,
    pattern=(LayerConfig(feed_forward="experts"),),
    expert_ffn_width=20,
    num_experts=4,
    experts_per_token=2,
    shared_experts=1,
    router="sigmoid",
)
MODELS = {
    "dense": DENSE,
    "dropless": MIXTURE,
    "bounded": dataclasses.replace(MIXTURE, capacity_factor=0.75),
}
MESHES = [
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"data": 2, "expert": 2, "tensor": 2},
    {"expert": 4, "context": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"fsdp": 2, "expert": 2, "context": 2},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"expert": 2, "context": 2, "tensor": 2},
    {"context": 8},
    {"expert": 2, "context": 4},
]
WAYS = ("ring", "ulysses", "all_gather")
FIRST = [("dropless", {"expert": 2, "context": 2, "tensor": 2}, "ring")]
MORE = [
    (model, mesh, way)
    for i, model in enumerate(MODELS)
    for j, mesh in enumerate(MESHES)
    for way in (WAYS if "context" in mesh else WAYS[:1])
    if (way == WAYS[(i + j) % 3] or "context" not in mesh)
    and (model, mesh, way) not in FIRST
    and not (way == "ulysses" and mesh["context"] * mesh.get("tensor", 1) > 4)
]
if not os.environ.get("JAXINFRA_ALL_MESHES"):
    MORE = MORE[::3]


def config(model, mesh, way, microbatches, rows):
    return Config(
        name="toy",
        model=MODELS[model],
        data=DataConfig(),
        train=TrainConfig(
            batch_size=rows,
            length=T,
            microbatches=microbatches,
            balance_loss=0.05,
            router_z_loss=0.02,
            router_bias_rate=0.01 if model != "dense" else 0.0,
        ),
        mesh=MeshConfig(**{"data": 1, **mesh}),
        parallel=ParallelConfig(context=way),
    )


def documents(count):
    """Rows of documents, the last ones with padding, as the stream gives them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (count, T + 1)).astype(np.uint16)
    cuts = np.full((count, 3), T + 1, np.uint16)
    cuts[:, 1] = rng.integers(3, T - 3, count)
    cuts[::2, 0] = T - 2
    return packing.Batch(tokens, np.sort(cuts, axis=1)[:, ::-1].copy())


@functools.cache
def gradients(model, mesh, way="ring", *, microbatches=1, rows=B):
    """(loss, gradients on the host, metrics, next model state)."""
    cfg = config(model, dict(mesh), way, microbatches, rows)
    count = int(np.prod([size for _, size in mesh])) if mesh else 1
    built = experiment.build(cfg, jax.devices()[:count])
    with jax.set_mesh(built.layout.mesh):
        state = built.init()
        batch = jax.device_put(documents(rows), experiment.batch_sharding(built.layout))
        grad_fn = built.task.on_batch(_grad_fn(built, microbatches))
        run = jax.jit(grad_fn, compiler_options=QUICK)
        found = run(state.params, state.model_state, batch, jax.random.key(1))
        after = built.task.update_state(state.model_state, found.aux.stats)
        grads, after, aux = jax.device_get((found.grads, after, found.aux))
    cut = lambda x, spec: x[tuple(map(slice, spec.shape))]
    grads = jax.tree.map(cut, grads, built.task.specs)
    return float(found.loss_sum) / float(aux.weight_sum), grads, aux.metrics, after


def _grad_fn(built, microbatches):
    of_loss = objective.grad_of(built.task.loss_fn)
    places = built.shardings.grads
    return accumulation.accumulate(of_loss, microbatches, shardings=places)


def check(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=LOSS)

    def near(path, got, want):
        off = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert off < GRADIENT, (jax.tree_util.keystr(path), off)

    jax.tree.map_with_path(near, found[1], expected[1])
    for name, value in expected[2].items():
        np.testing.assert_allclose(found[2][name], value, rtol=1e-4, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, found[3], expected[3])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mesh", "way"), [*FIRST, *MORE])
def test_loss_and_gradients_are_those_of_one_device(model, mesh, way):
    check(gradients(model, tuple(mesh.items()), way), gradients(model, ()))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dropless", "bounded"])
def test_microbatches_change_no_choice_of_experts(model):
    whole = gradients(model, (), rows=2 * B)
    assert whole[2]["router_busiest"] > 0
    check(gradients(model, (("expert", 2),), microbatches=2, rows=2 * B), whole)
