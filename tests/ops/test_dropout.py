"""Dropout: its rate, and that a row's id alone decides its mask."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.ops.layers import dropout

B, T, D = 4, 64, 32
RATE = 0.3
ones_BTD = np.ones((B, T, D), np.float32)
rows_B = np.array([5, 2, 9, 4], np.uint32)


def drop(rows_B, key=0, x_BTD=ones_BTD, rate=RATE):
    return np.asarray(
        dropout(jnp.asarray(x_BTD), jnp.asarray(rows_B), jax.random.key(key), rate=rate)
    )


def test_the_stated_share_is_dropped_and_the_rest_scaled_up():
    y = drop(rows_B)
    sigma = np.sqrt(RATE * (1 - RATE) / y.size)
    assert abs((y == 0).mean() - RATE) < 4 * sigma
    np.testing.assert_allclose(y[y != 0], 1 / (1 - RATE), rtol=1e-6)


def test_no_key_or_no_rate_is_the_identity():
    x_BTD = jnp.asarray(ones_BTD)
    assert dropout(x_BTD, jnp.asarray(rows_B), None, rate=RATE) is x_BTD
    assert dropout(x_BTD, jnp.asarray(rows_B), jax.random.key(0), rate=0.0) is x_BTD


def test_the_row_id_decides_the_mask_and_not_the_place():
    y, order = drop(rows_B), [2, 0, 3, 1]
    np.testing.assert_array_equal(drop(rows_B[order]), y[order])
    np.testing.assert_array_equal(drop(rows_B[1:2], x_BTD=ones_BTD[1:2]), y[1:2])
    assert (y[0] != y[1]).any()
    assert (drop(rows_B, key=1) != y).any()


def test_the_mask_is_the_same_on_every_mesh(four_devices):
    here = jax.NamedSharding(four_devices, jax.P("fsdp"))
    placed = jax.device_put((ones_BTD, rows_B), here)
    y = jax.jit(lambda x, r, k: dropout(x, r, k, rate=RATE))(*placed, jax.random.key(0))
    assert jax.typeof(y).sharding.spec[0] == "fsdp"
    y = np.asarray(y)
    with jax.set_mesh(jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1])):
        np.testing.assert_array_equal(y, drop(rows_B))


def test_bfloat16_stays_bfloat16():
    assert drop(rows_B, x_BTD=ones_BTD.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_token_is_dropped_alike_wherever_it_stands():
    order_T = np.random.default_rng(1).permutation(T)
    moved = dropout(
        jnp.asarray(ones_BTD),
        jnp.asarray(rows_B),
        jax.random.key(0),
        rate=RATE,
        order_T=order_T,
    )
    np.testing.assert_array_equal(moved, drop(rows_B)[:, order_T])
