"""Schedules by hand, and who is decayed, orthogonalised and clipped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfra.config import OptimizerConfig
from jaxinfra.params import ParamSpec, constant
from jaxinfra.train import optim

FLOAT32 = 1e-6
# Newton-Schulz turns leave singular values here: Keller Jordan, "Muon".
SINGULAR = (0.6, 1.3)
# Scaling the rows before them (arXiv:2512.04632) turns the direction a little.
POLAR = 0.95


def curve(steps, **settings):
    cfg = OptimizerConfig(**settings)
    schedule = optim.make_schedule(cfg, steps)
    return np.array([float(schedule(k)) for k in range(steps + 1)])


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_warmup_is_linear_to_the_peak(name):
    found = curve(100, schedule=name, warmup_steps=10)
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 10, rtol=FLOAT32)
    assert found[10] == pytest.approx(1.0)
    assert found.max() <= 1.0 + FLOAT32


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_no_warmup_starts_at_the_peak(name):
    assert curve(100, schedule=name, warmup_steps=0)[0] == pytest.approx(1.0)


def test_constant_stays():
    assert set(curve(100, schedule="constant", warmup_steps=0)) == {1.0}


def test_cosine_is_half_a_turn_from_the_peak_to_the_final_fraction():
    found = curve(110, schedule="cosine", warmup_steps=10, final_fraction=0.2)
    turn = np.arange(101) / 100
    expected = 0.2 + 0.8 * (1 + np.cos(math.pi * turn)) / 2
    np.testing.assert_allclose(found[10:], expected, rtol=1e-5)
    assert found[-1] == pytest.approx(0.2)


def test_wsd_is_flat_then_falls_over_a_fraction_of_all_steps():
    found = curve(
        100,
        schedule="wsd",
        warmup_steps=10,
        decay_fraction=0.25,
        final_fraction=0.1,
    )
    np.testing.assert_allclose(found[10:76], 1.0)
    np.testing.assert_allclose(found[75:], np.linspace(1.0, 0.1, 26), rtol=1e-5)


def test_wsd_can_fall_all_the_way():
    found = curve(
        50, schedule="wsd", warmup_steps=20, decay_fraction=1.0, final_fraction=0.0
    )
    assert found[20] == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.0, abs=FLOAT32)


def test_the_host_table_is_the_schedule_times_the_peak():
    cfg = OptimizerConfig(learning_rate=3e-3, warmup_steps=5)
    schedule = optim.make_schedule(cfg, 40)
    table = optim.on_host(schedule, cfg, 40)
    for k in (0, 4, 5, 39, 40):
        assert table(k) == pytest.approx(3e-3 * float(schedule(k)), rel=FLOAT32)


SPECS = {
    "table": ParamSpec((7, 6), ("vocab", "embed"), (), "embedding", constant(1.0)),
    "head": ParamSpec((7, 6), ("vocab", "embed"), (1,), "head", constant(1.0)),
    "norm": ParamSpec((6,), (None,), (), "vector", constant(1.0)),
    # [layers, D, K, H], contracts D; [layers, K, H, D], contracts K and H.
    "query": ParamSpec(
        (6, 3, 4), ("embed", "heads", None), (0,), "matrix", constant(1.0)
    ).stacked(2),
    "out": ParamSpec(
        (3, 4, 6), ("heads", None, "embed"), (0, 1), "matrix", constant(1.0)
    ).stacked(2),
}
CONSTANT = {"schedule": "constant", "warmup_steps": 0}


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), SPECS
    )


def update(cfg, grads, params):
    tx = optim.make_optimizer(cfg, SPECS, optim.make_schedule(cfg, 10))
    updates, _ = tx.update(grads, tx.init(params), params, step=jnp.int32(0))
    return updates


def test_a_zero_gradient_moves_matrices_alone():
    cfg = OptimizerConfig(learning_rate=0.5, weight_decay=0.1, **CONSTANT)
    params = random_tree(0)
    found = update(cfg, jax.tree.map(jnp.zeros_like, params), params)
    for name, spec in SPECS.items():
        factor = -0.5 * 0.1 if spec.kind == "matrix" else 0.0
        np.testing.assert_allclose(found[name], factor * params[name], rtol=FLOAT32)


def test_a_zero_gradient_under_muon_moves_matrices_alone():
    cfg = OptimizerConfig(name="muon", learning_rate=0.5, weight_decay=0.1, **CONSTANT)
    params = random_tree(0)
    found = update(cfg, jax.tree.map(jnp.zeros_like, params), params)
    for name, spec in SPECS.items():
        factor = -0.5 * 0.1 if spec.kind == "matrix" else 0.0
        np.testing.assert_allclose(found[name], factor * params[name], atol=FLOAT32)


def test_muon_orthogonalises_each_layer_over_the_contracted_dims():
    cfg = OptimizerConfig(
        name="muon", learning_rate=0.5, weight_decay=0.0, clip_norm=0.0, **CONSTANT
    )
    grads = random_tree(1)
    found = update(cfg, grads, random_tree(0))
    for name, inputs, outputs in (("query", 6, 12), ("out", 12, 6)):
        scale = 0.5 * math.sqrt(max(1.0, outputs / inputs))
        for layer in range(2):
            matrix = np.asarray(found[name][layer]).reshape(inputs, outputs)
            gradient = np.asarray(grads[name][layer]).reshape(inputs, outputs)
            values = np.linalg.svd(matrix / scale, compute_uv=False)
            assert SINGULAR[0] < values.min()
            assert values.max() < SINGULAR[1]
            u, _, vt = np.linalg.svd(gradient, full_matrices=False)
            polar = -(u @ vt)  # the nearest matrix with orthonormal rows or columns
            cosine = np.sum(matrix * polar) / np.linalg.norm(matrix)
            cosine /= np.linalg.norm(polar)
            assert cosine > POLAR, cosine


def test_under_muon_all_else_goes_by_adam_at_its_own_rate():
    cfg = OptimizerConfig(
        name="muon",
        learning_rate=0.5,
        adam_learning_rate=0.01,
        clip_norm=0.0,
        **CONSTANT,
    )
    grads, params = random_tree(1), random_tree(0)
    found = update(cfg, grads, params)
    adam = optax.adam(0.01, b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps)
    expected, _ = adam.update(grads, adam.init(params), params)
    for name in ("table", "head", "norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_clipping_is_by_the_norm_of_all_gradients_together():
    def settings(clip_norm):  # a large eps: else adam undoes any scale
        return OptimizerConfig(clip_norm=clip_norm, eps=1.0, **CONSTANT)

    grads, params = random_tree(1), random_tree(0)
    norm = float(optax.tree.norm(grads))
    clipped = update(settings(norm / 10), grads, params)
    tenth = jax.tree.map(lambda g: g / 10, grads)
    expected = update(settings(0.0), tenth, params)
    unclipped = update(settings(2 * norm), grads, params)
    plain = update(settings(0.0), grads, params)
    for name in SPECS:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(unclipped[name], plain[name])


def test_the_rate_follows_the_step_given_and_not_the_updates_made():
    cfg = OptimizerConfig(learning_rate=0.5, warmup_steps=10, clip_norm=0.0)
    tx = optim.make_optimizer(cfg, SPECS, optim.make_schedule(cfg, 10))
    grads, params = random_tree(1), random_tree(0)
    state = tx.init(params)
    first, _ = tx.update(grads, state, params, step=jnp.int32(0))
    fifth, _ = tx.update(grads, state, params, step=jnp.int32(4))
    np.testing.assert_allclose(fifth["norm"], 5 * first["norm"], rtol=1e-5)
