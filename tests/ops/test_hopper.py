"""Grouped matmuls on Hopper GPUs, without one: what is asked of jax's kernels, and one
of them interpreted. `scripts/bench.py device` compares all of it on the device."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import params as interpreter

import jaxinfra
from jaxinfra.ops import grouped, hopper
from jaxinfra.precision import policy

R, I, O, E, ALIGN = 256, 128, 256, 3, 32  # noqa: E741
SIZES_E = jnp.array([96, 0, 64], jnp.int32)  # the last 96 rows are of no group


def rows_and_weights(dtype=jnp.bfloat16):
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape).astype(dtype)
    is_used_R1 = (jnp.arange(R) < SIZES_E.sum())[:, None]
    return draw(0, R, I) * is_used_R1, draw(1, E, I, O), draw(2, R, O) * is_used_R1


def each_row_alone(x_RI, w_EIO, sizes_E, *, transposed):
    """As `grouped_on_hopper` is said to compute."""
    expert_R = grouped.expert_of_rows(sizes_E, len(x_RI))
    equation = "ro,rio->ri" if transposed else "ri,rio->ro"
    y = jnp.einsum(equation, x_RI, w_EIO[expert_R], preferred_element_type=jnp.float32)
    is_used_R1 = (jnp.arange(len(x_RI)) < sizes_E.sum())[:, None]
    return jnp.where(is_used_R1, y, 0).astype(x_RI.dtype)


def each_expert_alone(x_RI, g_RO, sizes_E):
    """As `outer_on_hopper` is said to compute."""
    is_of_RE = jax.nn.one_hot(grouped.expert_of_rows(sizes_E, len(x_RI)), len(sizes_E))
    is_of_RE *= (jnp.arange(len(x_RI)) < sizes_E.sum())[:, None]
    sums = jnp.einsum("re,ri,ro->eio", is_of_RE, *map(jnp.float32, (x_RI, g_RO)))
    return sums.astype(x_RI.dtype)


def all_of(dtype=jnp.bfloat16):
    """{result, gradient of rows, of weights} of the grouped matmul."""
    x_RI, w_EIO, g_RO = rows_and_weights(dtype)
    own = policy("bfloat16" if dtype == jnp.bfloat16 else "float16")
    whole = jax.P()

    def local(x_RI, w_EIO, g_RO, sizes_E):
        multiply = lambda x, w: grouped.grouped(x, w, sizes_E, whole, ALIGN, own)
        y_RO, pull = jax.vjp(multiply, x_RI, w_EIO)
        return y_RO, *pull(g_RO.astype(y_RO.dtype))

    run = jax.shard_map(local, in_specs=(whole,) * 4, out_specs=(whole,) * 3)
    found = jax.jit(run)(x_RI, w_EIO, g_RO, SIZES_E)
    return dict(zip(("y", "dx", "dw"), found, strict=True))


def assert_as_rounded(found, expected):
    """Sums made in another order, rounded to bfloat16's 8 bits."""
    found, expected = np.float32(found), np.float32(expected)
    assert np.abs(found - expected).max() <= 2.0**-8 * np.abs(expected).max()


def on_hopper(monkeypatch, calls):
    def told(name, double):
        def call(*args, **how):
            calls.append(name)
            return double(*args, **how)

        monkeypatch.setattr(jaxinfra, name, call, raising=False)

    told("grouped_on_hopper", each_row_alone)
    told("outer_on_hopper", each_expert_alone)
    monkeypatch.setattr(grouped, "_device_kind", lambda: "NVIDIA H100 80GB HBM3")


def test_all_three_products_are_asked_of_the_kernels(one_device, monkeypatch):
    expected, calls = all_of(), []
    on_hopper(monkeypatch, calls)
    found = all_of()
    assert calls == ["grouped_on_hopper", "grouped_on_hopper", "outer_on_hopper"]
    for name in expected:
        assert_as_rounded(found[name], expected[name])


def test_float16_sums_over_all_tokens_stay_wide(one_device, monkeypatch):
    calls = []
    on_hopper(monkeypatch, calls)
    all_of(jnp.float16)
    assert calls == ["grouped_on_hopper", "grouped_on_hopper"]


@pytest.mark.parametrize(
    ("kind", "shape", "outer", "has"),
    [
        ("NVIDIA H200", (192, 64), 128, True),
        ("NVIDIA A100-SXM4-80GB", (192, 64), 128, False),
        ("NVIDIA H200", (191, 64), 128, False),
        ("NVIDIA H200", (192, 32), 128, False),
        ("NVIDIA H200", (192, 64), 96, False),
    ],
)
def test_the_kernel_is_for_hopper_and_whole_tiles(monkeypatch, kind, shape, outer, has):
    monkeypatch.setattr(grouped, "_device_kind", lambda: kind)
    assert grouped._has_kernel(jnp.zeros(shape, jnp.bfloat16), outer) == has
    assert not grouped._has_kernel(jnp.zeros(shape, jnp.float32), outer)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("outer", [128, 384, 768, 1536, 2048, 4096, 7168, 14336])
def test_tiles_side_by_side_cover_the_result(outer, transposed):
    _, columns, turn = hopper._tile(outer, transposed)
    assert outer % (columns * turn) == 0


@pytest.mark.slow
def test_interpreted_it_multiplies_each_row_with_its_expert(one_device):
    """Rows of no group, whose memory the kernel does not write, are zeros."""
    x_RI, w_EIO, _ = rows_and_weights()
    with interpreter.force_gpu_interpret_mode():
        found = hopper.grouped_on_hopper(x_RI, w_EIO, SIZES_E, transposed=False)
    expected = each_row_alone(x_RI, w_EIO, SIZES_E, transposed=False)
    assert_as_rounded(found, expected)
    assert not np.any(np.float32(found)[SIZES_E.sum() :])


def test_a_device_from_afar_answers_only_the_kernel_and_while_it_asks(monkeypatch):
    kernel, here = hopper.transposed_ragged_dot_mgpu, jax.devices
    afar = types.SimpleNamespace(abstract_device=types.SimpleNamespace(num_cores=132))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: afar)
    with hopper._asked_for_multiprocessors():
        assert kernel.jax.devices()[0].core_count == 132
        assert kernel.jax.ShapeDtypeStruct is jax.ShapeDtypeStruct
        assert jax.devices is here
    assert kernel.jax is jax
