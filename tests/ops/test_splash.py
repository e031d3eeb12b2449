"""The splash kernel's program, interpreted, against the naive reference."""

import functools

import jax
import numpy as np
import pytest
from ops import naive_attention

from jaxinfra.ops import fused_attention

# float32 sums of up to 128 terms in blocks, online softmax; G heads add up in dk, dv.
FLOAT32_ROUNDING = 2e-5

CASES = {
    "causal": {"T": 128, "K": 2, "G": 1},
    "segments": {"T": 128, "K": 1, "G": 1, "with_segments": True},
    "window": {"T": 128, "K": 1, "G": 1, "window": 37},
    "softcap": {"T": 128, "K": 1, "G": 1, "softcap": 1.5},
    "grouped": {"T": 128, "K": 2, "G": 3},
    # 384 is three blocks of 128, so that blocks are skipped and cut.
    "all": {
        "T": 384, "K": 1, "G": 2, "with_segments": True, "window": 150, "softcap": 1.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_splash_is_naive_attention(name):
    # No mesh: jax's interpreter mixes sharding types, which the kernel never does.
    case = {"with_segments": False, "window": 0, "softcap": 0.0} | CASES[name]
    T, K, G = case["T"], case["K"], case["G"]
    *arrays, segments_BT = naive_attention.random_inputs(B=2, T=T, K=K, G=G, H=8)
    segments_BT = segments_BT if case["with_segments"] else None
    settings = {"window": case["window"], "softcap": case["softcap"]}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(q, k, v, g, segments_BT):
        attend = functools.partial(fused_attention.splash, **settings, interpret=True)
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments_BT), q, k, v)
        return out, *pull(g)

    got = run(*arrays, segments_BT)
    expected = naive_attention.forward_backward(*arrays, segments_BT, **settings)
    for part, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=FLOAT32_ROUNDING, err_msg=part)


@pytest.mark.parametrize(
    ("length", "block"), [(128, 128), (384, 128), (768, 256), (1024, 512)]
)
def test_blocks_are_the_largest_that_divide_the_length(length, block):
    assert fused_attention.block_sizes(length).block_q == block
