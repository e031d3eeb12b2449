"""Stochastic rounding to bfloat16: right on average, never far, the same everywhere."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfra import mesh, precision, sharding
from jaxinfra.ops import layers
from jaxinfra.train import accumulation, objective, optim, rounding

DRAWS = 4096
# Standard errors of a mean, of which one in a billion samples is further off.
FAR = 6.0
rng = np.random.default_rng(5)
# All magnitudes that both dtypes have as normal numbers, and both signs.
VALUES = (rng.standard_normal(300) * 10.0 ** rng.uniform(-35, 35, 300)).astype(
    np.float32
)
ODD = [0.0, -0.0, 1.0, -3.0, 2.0**-126, 2.0**127, np.inf, -np.inf, np.nan]


def draws(x, count=DRAWS):
    """`count` roundings of x by the bits of as many steps, as float32."""
    keys = jax.random.split(jax.random.key(1), count)

    def once(key):
        return rounding.round_to_bfloat16(x, rounding._bits(key, "w", x.shape))

    return np.asarray(jax.jit(jax.vmap(once))(keys)).astype(np.float32)


def neighbours(x):
    """The bfloat16 numbers below and above in magnitude, as float32."""
    low = (x.view(np.uint32) & 0xFFFF0000).astype(np.uint32)
    return low.view(np.float32), (low + 0x10000).astype(np.uint32).view(np.float32)


def test_the_mean_of_many_roundings_is_the_number():
    found = draws(jnp.asarray(VALUES)).astype(np.float64)
    low, high = (n.astype(np.float64) for n in neighbours(VALUES))
    up = (VALUES - low) / (high - low)
    deviation = np.abs(high - low) * np.sqrt(up * (1 - up) / DRAWS)
    assert np.all(np.abs(found.mean(0) - VALUES) <= FAR * deviation)
    total = ((found.mean(0) - VALUES) / np.maximum(deviation, 1e-45)).sum()
    assert abs(total) < FAR * np.sqrt(VALUES.size), "nor do they lean together"


def test_it_is_one_of_the_two_numbers_around():
    found = draws(jnp.asarray(VALUES), 64)
    low, high = neighbours(VALUES)
    assert np.all((found == low) | (found == high))
    assert np.any(found == low)
    assert np.any(found == high)


def test_exact_numbers_and_those_that_are_none_stay():
    exact = jnp.asarray(VALUES).astype(jnp.bfloat16).astype(jnp.float32)
    for x in (exact, jnp.asarray(ODD, jnp.float32)):
        for found in draws(x, 64):
            np.testing.assert_array_equal(found, x)
    # A NaN whose mantissa is only in the low half, which cutting would make infinite.
    low_nan = jax.lax.bitcast_convert_type(jnp.uint32(0x7F800001), jnp.float32)
    assert np.isnan(draws(low_nan[None], 64)).all()


def test_small_updates_are_not_lost_and_nearest_loses_them():
    params, updates = {"w": jnp.ones(4096, jnp.bfloat16)}, {"w": jnp.full(4096, 1e-4)}
    found, nearest = params, params
    for step in range(50):
        key = jax.random.fold_in(jax.random.key(0), step)
        found = rounding.apply_stochastic(found, updates, key)
        nearest = optim.apply_nearest(nearest, updates, key)
    assert np.all(nearest["w"] == 1)
    # Each of 4096 moves by a unit of 2**-7 with a chance of 1.3% a step.
    assert np.mean(np.float32(found["w"])) == pytest.approx(1.005, abs=3e-4)


def test_other_dtypes_are_only_added():
    params = {"w": jnp.asarray(VALUES), "b": jnp.float16(1.0)}
    updates = {"w": jnp.asarray(VALUES[::-1]), "b": jnp.float32(2.0**-12)}
    found = rounding.apply_stochastic(params, updates, jax.random.key(0))
    np.testing.assert_array_equal(found["w"], VALUES + VALUES[::-1])
    assert (found["b"].dtype, float(found["b"])) == (jnp.float16, 1.0)


def test_bits_depend_on_step_path_and_place():
    shape = (3, 40, 50)
    keys = [jax.random.fold_in(jax.random.key(0), step) for step in range(2)]
    arrays = [rounding._bits(key, path, shape) for key in keys for path in "ab"]
    words = np.stack([np.asarray(a).ravel() & 0xFFFF for a in arrays]) / 2.0**16
    centred = words - 0.5
    size = centred.shape[1]
    for i in range(4):
        for j in range(i):
            assert abs(np.mean(centred[i] * centred[j])) < FAR / 12 / np.sqrt(size)
        for lag in (1, 50, 2000):
            by = np.mean(centred[i, lag:] * centred[i, :-lag])
            assert abs(by) < FAR / 12 / np.sqrt(size - lag)
        # Uniform: mean and variance, 1/12, of all values.
        assert abs(centred[i].mean()) < FAR / np.sqrt(12 * size)
        assert np.var(centred[i]) == pytest.approx(1 / 12, rel=0.05)


def test_a_mesh_and_padding_change_no_bit():
    shapes = {"table": (7, 6), "up": (3, 8, 10)}
    params = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    updates = {n: 1e-3 * rng.standard_normal(s) for n, s in shapes.items()}
    key = jax.random.key(3)

    def applied(sizes, pad, specs):
        count = int(np.prod(list(sizes.values())))
        here = mesh.make_mesh(sizes, devices=jax.devices()[:count])
        places = {n: jax.NamedSharding(here, spec) for n, spec in specs.items()}

        def put(tree, dtype):
            padded = tree | {"table": np.pad(tree["table"], ((0, pad), (0, 0)))}
            return {
                n: jax.device_put(jnp.asarray(x, dtype), places[n])
                for n, x in padded.items()
            }

        step = jax.sharding.auto_axes(rounding.apply_stochastic, out_sharding=places)
        with jax.set_mesh(here):
            whole = jax.device_put(key, jax.NamedSharding(here, jax.P()))
            arrays = (put(params, jnp.bfloat16), put(updates, jnp.float32), whole)
            found = jax.device_get(jax.jit(step)(*arrays))
            text = jax.jit(step).lower(*arrays).compile().as_text()
        return found | {"table": found["table"][:7]}, text

    plain, _ = applied({"fsdp": 1}, 0, dict.fromkeys(shapes, jax.P()))
    specs = {"table": jax.P("tensor", "fsdp"), "up": jax.P(None, "fsdp", "tensor")}
    found, text = applied({"fsdp": 2, "tensor": 2}, 1, specs)
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    assert found["up"].dtype == ml_dtypes.bfloat16
    # Each device draws for its own part alone.
    assert "u32[3,4,5]" in text
    assert "u32[3,8,10]" not in text


def test_gradients_of_bfloat16_parameters_are_summed_in_float32_over_microbatches():
    """Parts of 1 and 2**-9: their sum needs 10 bits."""

    def grad_fn(params, model_state, batch, key):
        grads = {"w": jnp.max(batch).astype(jnp.bfloat16)}
        one = jnp.float32(1)
        return objective.Gradients(grads, one, objective.Aux(one, {}))

    here = mesh.make_mesh({"data": 1}, devices=jax.devices()[:1])
    places = {"w": jax.NamedSharding(here, jax.P())}
    with jax.set_mesh(here):
        parts = jnp.array([1.0, 2.0**-9, 2.0**-9, 2.0**-9], jnp.float32)
        batch = jax.device_put(parts, jax.NamedSharding(here, jax.P("data")))
        for count, expected in ((4, 1 + 3 * 2.0**-9), (1, 1.0)):
            fn = accumulation.accumulate(grad_fn, count, shardings=places)
            grads = jax.jit(fn)(None, (), batch, None).grads
            assert (grads["w"].dtype, float(grads["w"])) == (jnp.float32, expected)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_bfloat16_tables_gradient_is_summed_in_float32(zero):
    """512 times one token: bfloat16 sums of ones end at 256."""
    here = mesh.make_mesh({"fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    policy = precision.policy("bfloat16_params")
    rules = sharding.make_layout(here, zero=zero).params
    embed = functools.partial(layers.embed, policy=policy, rules=rules)
    with jax.set_mesh(here):
        spec = functools.partial(sharding.spec, rules)
        table = jax.device_put(jnp.ones((6, 4), jnp.bfloat16), spec("vocab", "embed"))
        tokens = jnp.full((2, 256), 4, jnp.uint16)
        tokens = jax.device_put(tokens, spec("batch", "length"))
        total = lambda table: jnp.sum(embed(table, tokens).astype(jnp.float32))
        found = jax.jit(jax.grad(total))(table)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(found)[4], 512)
