"""A loss that sees its matrices rounded: its value, its gradient, what it is for."""

import dataclasses

import jax
import numpy as np
import pytest
from tune import small
from tune.test_frozen import built, rows

from jaxinfra import experiment, options, params
from jaxinfra.config import ConfigError, LayerConfig
from jaxinfra.models.specs import param_specs
from jaxinfra.quant import compression
from jaxinfra.quant.aware import quantize_aware
from jaxinfra.quant.compression import Compression
from jaxinfra.train import objective

SUMS = 1e-6  # float32 sums in another order
AWARE = {"quantize_aware": "int4", "quantize_group": 4}


def in_few_bits(specs, weights, group=4):
    """Every matrix rounded and made an array again."""
    how = Compression(format="int4", method="nearest", group=group, matrices=())

    def one(spec, w):
        if spec.kind != "matrix":
            return w
        return jax.jit(
            lambda x: compression.arrays.dequantize(compression.in_form(x, spec, how))
        )(w)

    return jax.tree.map(one, specs, weights)


@pytest.mark.slow
def test_loss_and_gradient_are_those_at_the_rounded_matrices():
    aware, plain = built(small.config(train=AWARE)), built(small.config())
    with jax.set_mesh(plain.layout.mesh):
        weights = small.weights(plain.layout)
        few = in_few_bits(plain.task.specs, weights)
        batch = rows(0, plain.config, experiment.batch_sharding(plain.layout))

        def found(e, at):
            grad_fn = e.task.on_batch(objective.grad_of(e.task.loss_fn))
            return jax.jit(grad_fn)(at, (), batch, None)

        ours, theirs, other = (
            found(aware, weights),
            found(plain, few),
            found(plain, weights),
        )
    np.testing.assert_allclose(ours.loss_sum, theirs.loss_sum, rtol=SUMS)
    assert abs(ours.loss_sum - other.loss_sum) > 1e-3 * other.loss_sum
    for (path, g), expected in zip(
        params.named(ours.grads), jax.tree.leaves(theirs.grads), strict=True
    ):
        np.testing.assert_allclose(g, expected, atol=1e-4, err_msg=path)


def test_all_matrices_but_the_router_are_rounded_where_heads_are_as_wide_as_experts():
    model = dataclasses.replace(
        small.MODEL,
        head_dim=4,
        prefix=(LayerConfig(feed_forward="experts"),),
        num_experts=4,
        experts_per_token=2,
    )
    specs = param_specs(model)
    config = small.config(model=model, train=AWARE)
    aware = quantize_aware(lambda params, *_: params, specs, config)
    rng = np.random.default_rng(0)
    draw = lambda spec: rng.normal(size=spec.shape).astype(np.float32)
    weights = jax.tree.map(draw, specs)
    seen = jax.jit(aware)(weights, (), None, None)
    pairs = zip(params.named(weights), jax.tree.leaves(seen), strict=True)
    changed = {path for (path, w), rounded in pairs if np.any(w != rounded)}
    matrices = {path for path, spec in params.named(specs) if spec.kind == "matrix"}
    assert changed == matrices - {"prefix/0/ffn/router"}


TINY = dataclasses.replace(options.load_config("tiny").model, vocab_size=64)
ODD = dataclasses.replace(small.MODEL, width=12, head_dim=4, ffn_width=36)


@pytest.mark.parametrize(
    ("model", "train", "mesh"),
    [
        (TINY, {"quantize_aware": "int8"}, {"fsdp": 4}),
        # Devices share groups of both dims, and of the width the two codes of a byte.
        (
            ODD,
            {"quantize_aware": "int4", "quantize_group": 12},
            {"fsdp": 4, "tensor": 2},
        ),
        (
            TINY,
            {"quantize_aware": "int4", "quantize_group": 16, "microbatches": 2},
            {"fsdp": 2, "tensor": 2, "pipeline": 2},
        ),
    ],
    ids=["tiny", "odd", "stages"],
)
@pytest.mark.slow
def test_a_mesh_does_not_limit_the_groups(model, train, mesh):
    results = []
    for sizes in ({}, mesh):
        e = built(small.config(model=model, train=train, mesh=sizes))
        with jax.set_mesh(e.layout.mesh):
            weights = small.weights(e.layout, model)
            batch = rows(0, e.config, experiment.batch_sharding(e.layout))
            grad_fn = e.task.grad_fn or objective.grad_of(e.task.loss_fn)
            found = jax.jit(e.task.on_batch(grad_fn))(weights, (), batch, None)
            results.append((found.loss_sum, small.host(found.grads)))
    (loss, grads), (other, others) = results
    np.testing.assert_allclose(loss, other, rtol=SUMS)
    for (path, g), expected in zip(
        params.named(grads), jax.tree.leaves(others), strict=True
    ):
        # A vocabulary is padded over tensor.
        expected = expected[: len(g)]
        np.testing.assert_allclose(g, expected, atol=1e-4, err_msg=path)


def test_groups_that_do_not_divide_are_told_by_the_key():
    train = AWARE | {"quantize_group": 5}
    with pytest.raises(ConfigError, match=r"train.quantize_group=5: .*divide"):
        built(small.config(train=train))


@pytest.mark.slow
def test_it_loses_less_by_rounding_than_training_that_knew_nothing_of_it():
    """After the same steps on the same rows: by what the loss rises when channels are
    rounded whole."""
    rises = {}
    for name, train in {"aware": AWARE | {"quantize_group": 0}, "plain": {}}.items():
        config = small.config(train=train)
        e, exact = built(config), built(small.config())
        with jax.set_mesh(e.layout.mesh):
            state = e.init(begun=(small.weights(e.layout), ()))
            batch = rows(0, config, experiment.batch_sharding(e.layout))
            for _ in range(30):
                state, _ = e.train_step(state, batch)
            few = in_few_bits(e.task.specs, state.params, group=0)
            rounded, _ = exact.eval_step(few, (), batch)
            whole, _ = exact.eval_step(state.params, (), batch)
            rises[name] = float(rounded / whole)
    assert rises["aware"] < 0.75 * rises["plain"], rises
