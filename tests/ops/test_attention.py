"""Attention against a naive float64 reference, forward and gradient."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import kernels_anywhere, naive_attention

from jaxinfra.ops import attention, fused_attention, rematerialisation
from jaxinfra.ops.seam import Context
from jaxinfra.sharding import Rules, spec

# Softmax over 13 scores of size 1; gradients sum 13 such terms.
FLOAT32_ROUNDING = 5e-6
B, T, K, H = 2, 13, 2, 4
WINDOW, SOFTCAP = 5, 1.5

# Any three of the four meet in each way in those with an even number on.
COMBINATIONS = [
    pytest.param(on, marks=[pytest.mark.slow] if sum(on) % 2 else [])
    for on in itertools.product([False, True], repeat=4)
]


def named(combination):
    names = ("segments", "window", "softcap", "grouped")
    on = [n for n, is_on in zip(names, combination, strict=True) if is_on]
    return "+".join(on) or "plain"


def compare(function, inputs, *, with_segments, window, softcap, atol):
    """`function(q, k, v, segments)` and its gradients against the reference."""
    q, k, v, g, segments_BT = inputs
    segments_BT = segments_BT if with_segments else None

    # Optimising these programs takes longer than running them.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(q, k, v, g, segments_BT):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, segments_BT), q, k, v)
        return out, *pull(g)

    got = run(q, k, v, g, segments_BT)
    expected = naive_attention.forward_backward(
        *map(np.asarray, (q, k, v, g)),
        None if segments_BT is None else np.asarray(segments_BT),
        window=window,
        softcap=softcap,
    )
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, err_msg=name)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=named)
def test_xla_in_blocks_is_naive_attention(combination, one_device):
    with_segments, windowed, capped, grouped = combination
    inputs = naive_attention.random_inputs(B=B, T=T, K=K, G=3 if grouped else 1, H=H)
    settings = {"window": WINDOW * windowed, "softcap": SOFTCAP * capped}

    def blocks(q, k, v, segments_BT):  # 13 queries in blocks of 4, 4, 4, 1
        return attention.xla(q, k, v, segments_BT, segments_BT, **settings, block=4)

    compare(
        blocks, inputs, with_segments=with_segments, **settings, atol=FLOAT32_ROUNDING
    )


@pytest.mark.parametrize("block", [6, 13, 512])
def test_the_size_of_a_block_does_not_change_the_result(block, one_device):
    inputs = naive_attention.random_inputs(B=B, T=T, K=K, G=3, H=H)
    settings = {"window": WINDOW, "softcap": SOFTCAP}

    def blocks(q, k, v, segments_BT):
        return attention.xla(q, k, v, segments_BT, segments_BT, **settings, block=block)

    compare(blocks, inputs, with_segments=True, **settings, atol=FLOAT32_ROUNDING)


def test_more_than_32_blocks_make_larger_blocks():
    q = jax.ShapeDtypeStruct((1, 70, 1, 1, 2), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 70, 1, 2), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda q, k: attention.xla(q, k, k, block=1))(q, k)
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert names.count("remat2") + names.count("checkpoint") == 24  # of 3 queries


def attend_on(mesh, *, kernel, with_segments, window, softcap, inputs, atol):
    """`make_attend(...)` on the mesh, against the reference."""
    q, k, v, g, segments_BT = inputs
    names = ("batch", "length", "heads")
    placed = [
        jax.device_put(x, spec(Rules(), *names, *[None] * (x.ndim - 3)))
        for x in (q, k, v, g)
    ]
    placed.append(jax.device_put(segments_BT, spec(Rules(), "batch", "length")))
    attend = attention.make_attend(Rules(), kernel=kernel)

    def function(q, k, v, segments_BT):
        context = Context(segments_BT=segments_BT, positions_BT=None)
        out, cache = attend(q, k, v, context, "kept", window=window, softcap=softcap)
        assert cache == "kept"
        return out

    compare(
        function,
        placed,
        with_segments=with_segments,
        window=window,
        softcap=softcap,
        atol=atol,
    )


@pytest.mark.parametrize("with_segments", [False, True])
def test_attend_on_split_rows_and_heads_is_naive_attention(with_segments, four_devices):
    attend_on(
        four_devices,
        kernel=None,
        with_segments=with_segments,
        window=WINDOW,
        softcap=SOFTCAP,
        inputs=naive_attention.random_inputs(B=B, T=T, K=K, G=3, H=H),
        atol=FLOAT32_ROUNDING,
    )


@pytest.mark.parametrize("with_segments", [False, True])
def test_a_fused_kernel_on_split_rows_and_heads_is_naive_attention(
    with_segments, four_devices, monkeypatch
):
    def interpreted(*arrays, **settings):
        return attend(*arrays, **settings, interpret=True)

    attend = fused_attention.splash
    monkeypatch.setattr(fused_attention, "splash", interpreted)
    attend_on(
        four_devices,
        kernel="splash",
        with_segments=with_segments,
        window=37,
        softcap=0.0,
        inputs=naive_attention.random_inputs(B=2, T=128, K=2, G=2, H=8),
        atol=5 * FLOAT32_ROUNDING,
    )


@pytest.mark.parametrize("kernel", ["xla", "splash", "cudnn"])
def test_remat_keeps_the_result_of_attention_once(kernel, one_device, monkeypatch):
    kernels_anywhere.allow(monkeypatch)
    arrays = [
        jax.device_put(
            jnp.asarray(x, jnp.bfloat16),
            spec(Rules(), "batch", "length", "heads", *[None] * (x.ndim - 3)),
        )
        for x in naive_attention.random_inputs(B=2, T=128, K=2, G=3, H=8)[:3]
    ]
    attend = attention.make_attend(Rules(), kernel=kernel)

    def kept(remat):
        """(arrays as large as the result, times that cuDNN runs forward)"""
        saving = kernels_anywhere.saving(attend, remat)
        result, sizes = kernels_anywhere.sizes_kept(saving, arrays)
        total = lambda *x: jnp.sum(saving(*x).astype(jnp.float32))
        program = str(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*arrays))
        return sizes.count(result), program.count(rematerialisation.CUDNN + "[")

    once = int(kernel == "cudnn")
    assert kept("full") == (1, 2 * once)  # the queries
    assert kept("save:attention") == kept("offload:attention") == (2, once)  # and it


def test_bfloat16_scores_and_softmax_are_float32(one_device):
    q, k, v, _, _ = naive_attention.random_inputs(B=1, T=64, K=1, G=1, H=16)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    got = attention.xla(q, k, v)
    exact = attention.xla(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert got.dtype == jnp.bfloat16
    # Two roundings to 8 bits: of the weights and of the result.
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=2 * 2**-8 * 2)


def test_the_table_of_kernels_is_this():
    assert attention.table() == (
        "kernel  segments  window  softcap  grouped\n"
        "splash  yes       yes     yes      yes\n"
        "cudnn   yes       yes     no       yes\n"
        "xla     yes       yes     yes      yes"
    )


def test_a_fallback_says_once_which_feature_is_not_covered(one_device, caplog):
    attention.say_once.cache_clear()
    q, k, v, _, segments_BT = naive_attention.random_inputs(B=1, T=5, K=1, G=1, H=4)
    context = Context(positions_BT=None, segments_BT=jnp.asarray(segments_BT))
    attend = attention.make_attend(Rules(), kernel="cudnn")
    with caplog.at_level(logging.WARNING, logger="jaxinfra"):
        for _ in range(2):
            attend(*map(jnp.asarray, (q, k, v)), context, None, window=0, softcap=1.0)
    assert [record.getMessage() for record in caplog.records] == [
        "attention: cudnn does not cover softcap; xla is used instead"
    ]


@pytest.mark.parametrize(
    ("kernel", "shape", "dtype", "reason"),
    [
        ("splash", (1, 100, 1, 1, 64), "bfloat16", "length of 100"),
        ("splash", (1, 256, 1, 1, 64), "bfloat16", ""),
        ("cudnn", (1, 100, 1, 1, 64), "float32", "dtype float32"),
        ("cudnn", (1, 100, 1, 1, 256), "bfloat16", "heads of width 256"),
        ("cudnn", (1, 100, 1, 1, 64), "bfloat16", ""),
        ("cudnn", (1, 101, 1, 1, 64), "bfloat16", "documents in rows of 101"),
        ("cudnn", (1, 2**15, 1, 1, 64), "bfloat16", "documents in rows of 32768"),
    ],
)
def test_what_a_kernel_cannot_take_is_named(kernel, shape, dtype, reason):
    q = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    for segments in (True, False):
        case = attention.Case(segments, window=False, softcap=False, grouped=False)
        got = attention._uncovered(kernel, case, q, chunks=1)
        is_covered = not reason or ("documents" in reason and not segments)
        assert got == "" if is_covered else reason in got


@pytest.mark.parametrize(
    ("kernel", "length", "chunks", "reason"),
    [
        ("cudnn", 2**17, 16, ""),
        ("cudnn", 2**17, 8, "documents in rows of 16384"),
        ("cudnn", 16 * 101, 16, "documents in rows of 101"),
        ("splash", 2**17, 16, ""),
        ("splash", 2**10, 16, "length of 64"),
    ],
)
def test_of_a_row_in_chunks_a_kernel_sees_one_or_two(kernel, length, chunks, reason):
    q = jax.ShapeDtypeStruct((1, length, 1, 1, 64), jnp.bfloat16)
    case = attention.Case(segments=True, window=False, softcap=False, grouped=False)
    got = attention._uncovered(kernel, case, q, chunks)
    assert reason in got if reason else got == ""


@pytest.mark.parametrize("window", [0, 5])
def test_cudnn_is_asked_for_documents_apart(monkeypatch, window):
    """What is asked of jax, by its own implementation for any platform."""
    asked = jax.nn.dot_product_attention

    def anywhere(*args, implementation, **settings):
        assert implementation == "cudnn"
        return asked(*args, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", anywhere)
    q, k, v, _, segments_BT = naive_attention.random_inputs(B=2, T=24, K=2, G=3, H=8)
    assert len(np.unique(segments_BT)) > 1
    settings = {"window": window, "softcap": 0.0}
    for segments in (None, jnp.asarray(segments_BT)):
        given = (*map(jnp.asarray, (q, k, v)), segments)
        got = fused_attention.cudnn(*given, **settings)
        expected = attention.xla(*given, segments, **settings)
        np.testing.assert_allclose(got, expected, atol=1e-5)
