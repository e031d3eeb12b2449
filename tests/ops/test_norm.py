"""Norms against flax.linen's."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.ops import layers

FLOAT32_ROUNDING = 2e-6  # a few units of 2^-24 on values up to 5
BF16_ROUNDING = 2e-2  # 8-bit mantissa on values up to 4
B, T, D = 2, 5, 12

rng = np.random.default_rng(0)
x_BTD = rng.normal(1.0, 2.0, (B, T, D)).astype(np.float32)
scale_D = rng.normal(1.0, 0.3, D).astype(np.float32)
bias_D = rng.normal(0.0, 0.3, D).astype(np.float32)


def test_rms_norm_is_flax_rms_norm():
    expected = nn.RMSNorm(epsilon=1e-5).apply({"params": {"scale": scale_D}}, x_BTD)
    got = layers.rms_norm(jnp.asarray(x_BTD), jnp.asarray(scale_D), eps=1e-5)
    np.testing.assert_allclose(got, expected, atol=FLOAT32_ROUNDING)


def test_layer_norm_is_flax_layer_norm():
    params = {"scale": scale_D, "bias": bias_D}
    expected = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False).apply(
        {"params": params}, x_BTD
    )
    got = layers.layer_norm(
        jnp.asarray(x_BTD), jnp.asarray(scale_D), jnp.asarray(bias_D), eps=1e-5
    )
    np.testing.assert_allclose(got, expected, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_bfloat16_is_normalised_in_float32_and_returned_in_bfloat16(kind):
    # 300 + small: its mean square has no room in 8 bits.
    x = jnp.asarray(x_BTD + 300, jnp.bfloat16)
    ones, zeros = jnp.ones(D, jnp.bfloat16), jnp.zeros(D, jnp.bfloat16)

    def run(x, ones, zeros):
        if kind == "rms":
            return layers.rms_norm(x, ones, eps=1e-5)
        return layers.layer_norm(x, ones, zeros, eps=1e-5)

    got = run(x, ones, zeros)
    exact = run(*(a.astype(jnp.float32) for a in (x, ones, zeros)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=BF16_ROUNDING)
