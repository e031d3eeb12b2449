"""Schedules and update rules by hand, and who is decayed, orthogonalised, clipped."""

import dataclasses
import math
import typing

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
SCHEDULES = typing.get_args(typing.get_type_hints(OptimizerConfig)["schedule"])
NAMES = typing.get_args(typing.get_type_hints(OptimizerConfig)["name"])


def curve(steps, **settings):
    cfg = OptimizerConfig(**settings)
    schedule = optim.make_schedule(cfg, steps)
    return np.array([float(schedule(k)) for k in range(steps + 1)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear_to_the_peak(name):
    found = curve(100, schedule=name, warmup_steps=10)
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 10, rtol=FLOAT32)
    assert found[10] == pytest.approx(1.0)
    assert found.max() <= 1.0 + FLOAT32


@pytest.mark.parametrize("name", SCHEDULES)
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


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("final", [0.05, 0.5])
def test_linear_and_exponential_come_to_the_final_fraction(warmup, final):
    settings = {"warmup_steps": warmup, "final_fraction": final}
    part = np.arange(101) / 100
    found = curve(100 + warmup, schedule="linear", **settings)[warmup:]
    np.testing.assert_allclose(found, 1 - (1 - final) * part, rtol=1e-5)
    found = curve(100 + warmup, schedule="exponential", **settings)[warmup:]
    np.testing.assert_allclose(found, final**part, rtol=1e-5)


def test_linear_can_fall_to_nothing():
    found = curve(40, schedule="linear", warmup_steps=4, final_fraction=0.0)
    assert found[-1] == pytest.approx(0.0, abs=FLOAT32)


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_inverse_sqrt_does_not_know_the_number_of_steps(warmup):
    settings = {"schedule": "inverse_sqrt", "warmup_steps": warmup}
    found = curve(100, **settings)
    steps = np.arange(warmup, 101)
    offset = 0 if warmup else 1  # without a warm-up it begins as after one of one step
    expected = np.sqrt(max(warmup, 1) / (steps + offset))
    np.testing.assert_allclose(found[warmup:], expected, rtol=1e-5)
    np.testing.assert_array_equal(found, curve(200, **settings)[:101])


def test_the_host_table_is_the_schedule_times_the_peak():
    cfg = OptimizerConfig(learning_rate=3e-3, warmup_steps=5)
    schedule = optim.make_schedule(cfg, 40)
    table = optim.on_host(schedule, cfg, 40)
    for k in (0, 4, 5, 39, 40):
        assert table(k) == pytest.approx(3e-3 * float(schedule(k)), rel=FLOAT32)


@pytest.mark.parametrize("name", ["cosine", "wsd", "inverse_sqrt"])
def test_the_rates_of_a_long_run_are_made_when_they_are_asked_for(name):
    steps = 10**8
    cfg = OptimizerConfig(learning_rate=3e-3, warmup_steps=5, schedule=name)
    schedule = optim.make_schedule(cfg, steps)
    table = optim.on_host(schedule, cfg, steps)
    for k in (0, 5, 2**16 - 1, 2**16, steps // 2, 7, steps):
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


@pytest.mark.parametrize("optimizer", NAMES)
@pytest.mark.slow
def test_a_zero_gradient_moves_matrices_alone(optimizer):
    cfg = OptimizerConfig(
        name=optimizer, learning_rate=0.5, weight_decay=0.1, **CONSTANT
    )
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


def by_hand(rule, *, steps=3, **settings):
    """(found, expected) updates after `steps`, of `rule(name, i, gradient, parameter)`
    in numpy, where a parameter is one layer's."""
    cfg = OptimizerConfig(
        learning_rate=0.1, weight_decay=0.0, clip_norm=0.0, **settings, **CONSTANT
    )
    tx = optim.make_optimizer(cfg, SPECS, optim.make_schedule(cfg, 10))
    params = random_tree(0)
    state = tx.init(params)
    for step in range(steps):
        grads = random_tree(1 + step)
        found, state = tx.update(grads, state, params, step=jnp.int32(step))
        expected = {}
        for name, spec in SPECS.items():
            g, p = np.asarray(grads[name]), np.asarray(params[name])
            if "layers" in spec.axes:
                layers = [rule(name, i, step, g[i], p[i]) for i in range(len(g))]
                expected[name] = -0.1 * np.stack(layers)
            else:
                expected[name] = -0.1 * rule(name, 0, step, g, p)
    return found, expected


def check_all(found, expected):
    for name in SPECS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_sgd_is_a_sum_of_gradients_that_fades():
    sums = {}

    def rule(name, i, step, g, p):
        sums[name, i] = g + 0.8 * sums.get((name, i), 0.0)
        return sums[name, i]

    check_all(*by_hand(rule, name="sgd", momentum=0.8))


def test_lion_is_the_sign_of_a_mean_and_keeps_another():
    """arXiv:2302.06675 algorithm 2."""
    kept = {}

    def rule(name, i, step, g, p):
        m = kept.get((name, i), 0.0)
        kept[name, i] = 0.98 * m + 0.02 * g
        return np.sign(0.9 * m + 0.1 * g)

    check_all(*by_hand(rule, name="lion", beta1=0.9, beta2=0.98))


# Numbers of rows of each layer's matrix, whose other dims are columns; 1: a vector.
ROWS = {"table": 7, "head": 7, "norm": 1, "query": 6, "out": 12}


def test_adafactor_factors_every_layer_by_itself():
    """arXiv:1804.04235 algorithms 4 (matrices), 5 (vectors) and section 8."""
    kept = {}

    def rms(x):
        return np.sqrt(np.mean(np.square(x)))

    def rule(name, i, step, g, p):
        keep = 1 - (step + 1.0) ** -0.8
        square = g.reshape(ROWS[name], -1).astype(np.float64) ** 2 + 1e-30
        if ROWS[name] > 1:
            row, column = kept.get((name, i), (0.0, 0.0))
            row = keep * row + (1 - keep) * square.mean(1)
            column = keep * column + (1 - keep) * square.mean(0)
            kept[name, i] = row, column
            second = np.outer(row, column) / row.mean()
        else:
            second = keep * kept.get((name, i), 0.0) + (1 - keep) * square
            kept[name, i] = second
        u = g / np.sqrt(second).reshape(g.shape)
        return u / max(1.0, rms(u)) * max(1e-3, rms(p))

    check_all(*by_hand(rule, name="adafactor"))


def test_adafactor_keeps_rows_and_columns_and_no_more():
    cfg = OptimizerConfig(name="adafactor", **CONSTANT)
    specs = {
        "w": ParamSpec((50, 4, 10), ("embed", "heads", None), (0,), "matrix", None)
    }
    specs["w"] = specs["w"].stacked(3)
    tx = optim.make_optimizer(cfg, specs, optim.make_schedule(cfg, 10))
    state = tx.init({"w": jnp.ones(specs["w"].shape)})
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert count == 3 * (50 + 40) + 2 * 3, "and of each layer a count and a stand-in"


def test_padding_of_the_vocabulary_changes_no_update_of_adafactor():
    cfg = OptimizerConfig(name="adafactor", **CONSTANT)
    specs = {"table": dataclasses.replace(SPECS["table"], shape=(5, 6))}
    tx = optim.make_optimizer(cfg, specs, optim.make_schedule(cfg, 10))

    def updated(rows):
        """Update and state of five rows of numbers, the rest zeros."""
        grads, params = (
            {"table": random_tree(seed)["table"][:rows].at[5:].set(0.0)}
            for seed in (1, 0)
        )
        return tx.update(grads, tx.init(params), params, step=jnp.int32(0))

    (small, small_state), (large, large_state) = updated(5), updated(7)
    np.testing.assert_array_equal(small["table"], large["table"][:5])
    assert not np.any(large["table"][5:])
    jax.tree.map(np.testing.assert_array_equal, small_state, large_state)


@pytest.mark.parametrize("optimizer", NAMES)
def test_bfloat16_parameters_get_float32_updates_from_float32_moments(optimizer):
    cfg = OptimizerConfig(name=optimizer, ema_decay=0.9, **CONSTANT)
    tx = optim.make_optimizer(cfg, SPECS, optim.make_schedule(cfg, 10))
    cast = lambda tree, dtype: jax.tree.map(lambda x: x.astype(dtype), tree)
    grads, params = random_tree(1), cast(random_tree(0), jnp.bfloat16)
    state = tx.init(params)
    found, after = tx.update(grads, state, params, step=jnp.int32(0))
    for leaf in jax.tree.leaves((found, state, after)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    wide = cast(params, jnp.float32)
    expected, _ = tx.update(grads, tx.init(wide), wide, step=jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_moments_are_kept_in_the_dtype_of_the_policy():
    cfg = OptimizerConfig(**CONSTANT)
    schedule = optim.make_schedule(cfg, 10)
    tx = optim.make_optimizer(cfg, SPECS, schedule, moments=jnp.bfloat16)
    grads, params = random_tree(1), random_tree(0)
    state = tx.init(params)
    found, after = tx.update(grads, state, params, step=jnp.int32(0))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    for leaf in jax.tree.leaves((state, after)):
        assert leaf.dtype in (jnp.bfloat16, jnp.int32)


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
