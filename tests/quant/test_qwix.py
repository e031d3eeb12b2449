"""Low-precision matmuls and formats against qwix, Google's quantization library.

    pip install --no-deps qwix==0.1.8

No extra brings it: where it is not there, these tests are passed over. `.ci/run` has it
in the environment of oracles.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant import test_matmul as ours

from jaxinfra.quant import arrays

pytest.importorskip("qwix", reason="pip install --no-deps qwix==0.1.8")
from qwix._src.core import dot_general_qt, numerics, qarray

pytestmark = pytest.mark.slow

# Codes and scales are the same; sums of products come in another order, in float32.
SUMMED = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture(autouse=True)
def int8_to_127(monkeypatch):
    """qwix scales int8 to 127.5, of which half a step is cut off; here it is 127."""
    bound = numerics.get_symmetric_bound
    of = lambda qtype: 127.0 if qtype == jnp.int8 else bound(qtype)
    monkeypatch.setattr(numerics, "get_symmetric_bound", of)


def qwix_config(name):
    """The recipe of `--precision name`, but for rounding by chance, as qwix says it."""
    forward, backward = {
        "int8": (jnp.int8, jnp.int8),
        "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
        "mxfp8": ("mxfp8", "mxfp8"),
    }[name]
    is_tensor, block = name == "fp8", 32 if name == "mxfp8" else None
    # What it calls a residual is an operand of which it has no codes: blocks lie along
    # what the forward product sums over.
    residual = {"dlhs_residual_qtype": forward, "drhs_residual_qtype": forward}
    return dot_general_qt.DotGeneralQtConfig(
        lhs_qtype=forward,
        rhs_qtype=forward,
        dlhs_grad_qtype=backward,
        drhs_grad_qtype=backward,
        lhs_disable_channelwise_axes=is_tensor,
        rhs_disable_channelwise_axes=is_tensor,
        dlhs_grad_disable_channelwise_axes=is_tensor,
        drhs_grad_disable_channelwise_axes=is_tensor,
        tile_size=block,
        dlhs_tile_size=block,
        drhs_tile_size=block,
        # Nothing is beyond the range, so there is nothing to clip.
        disable_gradient_clipping=True,
        **(residual if block else {}),
    )


@pytest.mark.parametrize(
    ("name", "native"),
    [("fp8", False), ("fp8", True), ("int8", False), ("int8", True), ("mxfp8", False)],
)
def test_a_product_and_both_its_gradients_are_those_of_qwix(name, native):
    x, w, g = ours.operands()
    changes = {"by_chance": False} if name == "int8" else {}
    recipe = ours.recipe_of(name, **changes)
    y, dx, dw, _ = ours.run(recipe, x, ours.weight(w), g, native=native)
    dims = (((2,), (0,)), ((), ()))
    product = functools.partial(
        dot_general_qt.dot_general_qt, dimension_numbers=dims, config=qwix_config(name)
    )
    their_y, pull = jax.vjp(product, x, w)
    for mine, theirs in zip((y, dx, dw), (their_y, *pull(g)), strict=True):
        np.testing.assert_allclose(mine, theirs, **SUMMED)
    exact = np.einsum("btd,df->btf", x, w)
    assert not np.allclose(y, exact, **SUMMED), "the tolerance would hide the rounding"


@pytest.mark.parametrize(
    ("name", "qtype", "dims", "channels", "block"),
    [
        ("int8", jnp.int8, (0,), (1,), 0),
        ("fp8_e4m3", jnp.float8_e4m3fn, (0,), (1,), 0),
        ("fp8_e5m2", jnp.float8_e5m2, (0, 1), (), 0),
        ("mxfp8", "mxfp8", (0,), (1,), 32),
        ("nf4", "nf4", (0,), (1,), 64),
    ],
)
def test_an_array_in_few_bits_is_that_of_qwix(name, qtype, dims, channels, block):
    w = jax.random.normal(jax.random.key(1), (128, 48)) * jnp.exp2(jnp.arange(48) % 5)
    how = qarray.HowToQuantize(
        qtype=qtype,
        channelwise_axes=channels,
        tiled_axes={0: block} if block else {},
    )
    theirs = qarray.dequantize(qarray.quantize(w, how))
    q = arrays.quantize(w, name, dims=dims, block=block)
    # A scale is a division's or a product's, so it may differ in its last bit.
    np.testing.assert_allclose(arrays.dequantize(q), theirs, rtol=1e-6)
