"""The feed-forward layer against numpy, for every activation."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.ops import layers

FLOAT32_ROUNDING = 2e-5  # sums of 12 terms, through the platform's fast tanh
B, T, D, F = 2, 5, 8, 12

rng = np.random.default_rng(0)
x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
params = {
    "up": rng.normal(size=(D, F)),
    "gate": rng.normal(size=(D, F)),
    "down": rng.normal(size=(F, D)),
    "up_bias": rng.normal(size=F),
    "down_bias": rng.normal(size=D),
}
params = {name: array.astype(np.float32) for name, array in params.items()}


def plain_einsum(equation, x, w, *, out):
    assert len(out) == len(equation.split("->")[1])
    return jnp.einsum(equation, x, w)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "geglu": gelu_tanh,
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": gelu_tanh,
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_the_published_formula(activation, biased):
    act = ACTIVATIONS[activation]
    used = dict(params)
    if activation not in layers.GATED:
        del used["gate"]
    if not biased:
        del used["up_bias"], used["down_bias"]
    up = x_BTD @ used["up"] + used.get("up_bias", 0)
    hidden = act(x_BTD @ used["gate"]) * up if "gate" in used else act(up)
    expected = hidden @ used["down"] + used.get("down_bias", 0)
    given = {name: jnp.asarray(array) for name, array in used.items()}
    got = layers.mlp(
        given, jnp.asarray(x_BTD), activation=activation, einsum=plain_einsum
    )
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got / scale, expected / scale, atol=FLOAT32_ROUNDING)
