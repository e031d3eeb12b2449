"""Rotary embedding against multiplication by unit complex numbers."""

import jax.numpy as jnp
import numpy as np

from jaxinfra.ops import layers

FLOAT32_ANGLES = 2e-5  # angles up to 300 are good to 2^-24 of themselves
B, T, K, G, H = 2, 5, 3, 2, 8

rng = np.random.default_rng(0)
x_BTKGH = rng.normal(size=(B, T, K, G, H)).astype(np.float32)
positions_BT = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 300]], np.int32)


def rotate(x, positions_BT, theta=100.0):
    angles = layers.rotations(
        jnp.asarray(positions_BT), layers.rope_frequencies(H, theta)
    )
    return layers.rope(jnp.asarray(x), *angles)


def test_rope_turns_complex_numbers_by_position_times_frequency():
    frequencies = 100.0 ** (-np.arange(H // 2) / (H // 2))
    z = x_BTKGH[..., : H // 2] + 1j * x_BTKGH[..., H // 2 :]
    z = z * np.exp(1j * positions_BT[..., None] * frequencies)[:, :, None, None]
    expected = np.concatenate([z.real, z.imag], axis=-1)
    np.testing.assert_allclose(
        rotate(x_BTKGH, positions_BT), expected, atol=FLOAT32_ANGLES
    )


def test_keys_without_groups_turn_as_queries_do():
    whole = rotate(x_BTKGH, positions_BT)
    keys = rotate(x_BTKGH[:, :, :, 0], positions_BT)
    np.testing.assert_array_equal(keys, whole[:, :, :, 0])


def test_scores_depend_on_the_distance_alone():
    near, far = rotate(x_BTKGH, positions_BT), rotate(x_BTKGH, positions_BT + 50)
    dots = [jnp.einsum("TKGH,SKGH->KGTS", y[0], y[0]) for y in (near, far)]
    np.testing.assert_allclose(dots[1], dots[0], atol=1e-4)


def test_position_0_changes_nothing_and_bfloat16_stays():
    zeros = np.zeros_like(positions_BT)
    np.testing.assert_array_equal(rotate(x_BTKGH, zeros), x_BTKGH)
    assert rotate(x_BTKGH.astype(jnp.bfloat16), zeros).dtype == jnp.bfloat16


def test_positions_257_and_256_differ_in_bfloat16():
    x = np.ones((1, 2, 1, 1, H), jnp.bfloat16)
    turned = rotate(x, np.array([[256, 257]])).astype(jnp.float32)
    assert np.abs(turned[0, 0] - turned[0, 1]).max() > 0.1
