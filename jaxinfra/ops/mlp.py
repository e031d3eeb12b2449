"""The feed-forward layer: two or three contractions and a nonlinearity."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxinfra.ops.seam import Einsum

GATED = ("swiglu", "geglu")


def mlp(
    params: dict, x_BTD: jax.Array, *, activation: str, einsum: Einsum
) -> jax.Array:
    """x -> act(x up) down, or act(x gate) * (x up) down for the gated ones.

    `params`: up_DF, down_FD, gate_DF if gated, up_bias_F and down_bias_D if biased.
    Source: arXiv:2002.05202 (gated), arXiv:2109.08668 (relu squared).
    """
    hidden = ("batch", "length", "ffn")
    up_BTF = einsum("BTD,DF->BTF", x_BTD, params["up"], out=hidden)
    if "up_bias" in params:
        up_BTF += params["up_bias"].astype(up_BTF.dtype)
    up_BTF = checkpoint_name(up_BTF, "ffn_in")
    if activation in GATED:
        gate_BTF = einsum("BTD,DF->BTF", x_BTD, params["gate"], out=hidden)
        gate_BTF = checkpoint_name(gate_BTF, "ffn_in")
        act_BTF = _ACTIVATIONS[activation](gate_BTF) * up_BTF
    else:
        act_BTF = _ACTIVATIONS[activation](up_BTF)
    y_BTD = einsum(
        "BTF,FD->BTD", act_BTF, params["down"], out=("batch", "length", "width")
    )
    if "down_bias" in params:
        y_BTD += params["down_bias"].astype(y_BTD.dtype)
    return checkpoint_name(y_BTD, "ffn_out")


_ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}
