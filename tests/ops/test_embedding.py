"""Lookup in a split table against plain indexing, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra import precision, sharding
from jaxinfra.ops import layers

FLOAT32_ROUNDING = 1e-6
# Optimising these programs takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0}
B, T, D, V, P = 4, 5, 6, 14, 7

rng = np.random.default_rng(0)
table_VD = rng.normal(size=(V, D)).astype(np.float32)
tokens_BT = rng.integers(0, V, (B, T)).astype(np.uint16)
tokens_BT[0, :3] = (0, V - 1, V // 2)  # ends of both devices' parts
cotangent_BTD = rng.normal(size=(B, T, D)).astype(np.float32)


def look_up(function, table, names, tokens_BT, *, policy, zero):
    """(rows, gradient of the table), on the mesh that is set."""
    layout = sharding.make_layout(jax.sharding.get_mesh(), zero=zero)
    rules = layout.params
    table = jax.device_put(table, sharding.spec(rules, *names))
    tokens_BT = jax.device_put(tokens_BT, sharding.spec(rules, "batch", "length"))
    g_BTD = jax.device_put(
        cotangent_BTD[:, : tokens_BT.shape[1]],
        sharding.spec(rules, "batch", "length", None),
    )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(table, tokens_BT, g_BTD):
        x_BTD, pull = jax.vjp(
            lambda table: function(table, tokens_BT, policy=policy, rules=rules), table
        )
        return x_BTD, pull(g_BTD.astype(x_BTD.dtype))[0]

    x_BTD, dtable = run(table, tokens_BT, g_BTD)
    assert jax.typeof(x_BTD).sharding.spec == jax.typeof(g_BTD).sharding.spec
    assert jax.typeof(dtable).sharding.spec == jax.typeof(table).sharding.spec
    return x_BTD, dtable


@pytest.mark.parametrize("zero", [1, 3])
def test_embedding_and_its_gradient_are_plain_indexing(each_mesh, zero):
    x_BTD, dtable_VD = look_up(
        layers.embed,
        table_VD,
        ("vocab", "embed"),
        tokens_BT,
        policy=precision.policy("float32"),
        zero=zero,
    )
    np.testing.assert_array_equal(x_BTD, table_VD[tokens_BT])
    expected = np.zeros_like(table_VD)
    np.add.at(expected, tokens_BT, cotangent_BTD)
    np.testing.assert_allclose(dtable_VD, expected, atol=FLOAT32_ROUNDING)


def test_few_tokens_change_places_and_the_table_stays(four_devices):
    """6 tokens a device, fewer than its 7 rows: no gather of the table."""
    few_BT = tokens_BT[:, :3]
    policy = precision.policy("float32")
    x_BTD, dtable_VD = look_up(
        layers.embed, table_VD, ("vocab", "embed"), few_BT, policy=policy, zero=3
    )
    np.testing.assert_array_equal(x_BTD, table_VD[few_BT])
    expected = np.zeros_like(table_VD)
    np.add.at(expected, few_BT, cotangent_BTD[:, :3])
    np.testing.assert_allclose(dtable_VD, expected, atol=FLOAT32_ROUNDING)
    rules = sharding.make_layout(jax.sharding.get_mesh()).params
    program = jax.jit(lambda t, i: layers.embed(t, i, policy=policy, rules=rules))
    table = jax.device_put(table_VD, sharding.spec(rules, "vocab", "embed"))
    ids = jax.device_put(few_BT, sharding.spec(rules, "batch", "length"))
    text = program.lower(table, ids).as_text()
    assert "all_to_all" in text
    assert f"tensor<{V // 2}x{D}xf32>" not in text, "a whole table on a device"


def test_under_bfloat16_rows_are_rounded_once_and_gradients_sum_in_float32(
    four_devices,
):
    x_BTD, dtable_VD = look_up(
        layers.embed,
        table_VD,
        ("vocab", "embed"),
        np.zeros_like(tokens_BT),
        policy=precision.policy("bfloat16"),
        zero=3,
    )
    assert (x_BTD.dtype, dtable_VD.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = cotangent_BTD.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_allclose(
        np.asarray(dtable_VD)[0], rounded.sum((0, 1)), atol=10 * FLOAT32_ROUNDING
    )


def test_learned_positions_and_their_gradient_are_plain_indexing(each_mesh):
    positions_BT = np.tile(np.array([0, 1, 2, 0, 1]), (B, 1)).astype(np.int32)
    table_PD = table_VD[:P]
    x_BTD, dtable_PD = look_up(
        layers.position_rows,
        table_PD,
        (None, "embed"),
        positions_BT,
        policy=precision.policy("float32"),
        zero=3,
    )
    np.testing.assert_array_equal(x_BTD, table_PD[positions_BT])
    expected = np.zeros_like(table_PD)
    np.add.at(expected, positions_BT, cotangent_BTD)
    np.testing.assert_allclose(dtable_PD, expected, atol=FLOAT32_ROUNDING)
