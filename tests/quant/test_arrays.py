"""Quantized arrays against ml_dtypes, the published tables and their error bounds."""

import hypothesis
import hypothesis.extra.numpy as arrays_of
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxinfra
from jaxinfra import params
from jaxinfra.checkpoint import lifecycle, restore
from jaxinfra.quant import arrays, formats

NAMES = list(formats.FORMATS)
# Half a step of each format, relative to the group's largest magnitude; nf4's widest
# gap is between -1 and -0.696.
HALF_STEP = {
    "int8": 0.5 / 127,
    "int4": 0.5 / 7,
    "fp8_e4m3": 2.0**-4,
    "fp8_e5m2": 2.0**-3,
    "mxfp8": 2.0**-4,
    "nf4": 0.152,
}
FLOAT32 = 1 + 2.0**-20  # a division and a multiplication round too
# Source: arXiv:2305.14314 appendix E, "NormalFloat 4-bit data type".
PUBLISHED_NF4 = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453
-0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0
0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
numbers = arrays_of.arrays(
    np.float32,
    st.tuples(st.just(3), st.sampled_from([32, 64]), st.just(2)),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
)


def normal(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(x=numbers, name=st.sampled_from(NAMES))
def test_a_round_trip_is_off_by_half_a_step_of_its_group(x, name):
    q = arrays.quantize(jnp.asarray(x), name, dims=(1,), block=32)
    error = np.abs(np.asarray(arrays.dequantize(q)) - x).reshape(3, -1, 32, 2)
    largest = np.abs(x).reshape(3, -1, 32, 2).max(axis=2, keepdims=True)
    assert (error <= largest * HALF_STEP[name] * FLOAT32 + 2.0**-126).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_dequantized_is_quantized_to_itself(name):
    q = arrays.quantize(normal((4, 64, 6)), name, dims=(1,), block=32)
    again = arrays.quantize(arrays.dequantize(q), name, dims=(1,), block=32)
    # Values and not codes: mxfp8's scale may halve once the largest is rounded.
    np.testing.assert_allclose(
        arrays.dequantize(q), arrays.dequantize(again), rtol=2.0**-20
    )


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_codes_are_those_of_ml_dtypes(name):
    dtype = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}
    words = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    largest = formats.FORMATS[name].largest
    x = words.view(np.float32)
    near = (normal((50_000,)) * np.logspace(-5, 3, 50_000)).astype(np.float32)
    x = np.concatenate([x[np.abs(x) <= largest], near[np.abs(near) <= largest]])
    assert len(x) > 100_000
    ours = np.asarray(formats.round_to(jnp.asarray(x), name)).view(np.uint8)
    np.testing.assert_array_equal(ours, x.astype(dtype[name]).view(np.uint8))


def test_nf4_stores_the_published_table():
    table = np.array(PUBLISHED_NF4.split(), np.float32)
    codes = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(formats.values_of(codes, "nf4"), table)
    np.testing.assert_array_equal(formats.round_to(jnp.asarray(table), "nf4"), codes)


def test_the_codes_of_nf4_are_quantiles_of_a_normal_distribution():
    """Source: arXiv:2305.14314 appendix E; bitsandbytes create_normal_map."""
    offset = 0.9677083
    ppf = lambda p: np.sqrt(2) * jax.scipy.special.erfinv(2 * np.asarray(p) - 1)
    positive = ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -ppf(np.linspace(offset, 0.5, 8)[:-1])
    table = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(formats.NF4_CODES, table / table.max(), atol=1e-6)


def test_scales_of_mxfp8_are_the_smallest_powers_of_two_without_saturation():
    x = normal((2, 96, 5)) * 10.0 ** jnp.arange(-20, -10, 2.0)
    q = arrays.quantize(x, "mxfp8", dims=(1,))
    assert q.scales.shape == (2, 3, 5)
    scale = 2.0 ** (np.asarray(q.scales, np.float64) - 127)
    largest = np.abs(np.asarray(x, np.float64)).reshape(2, 3, 32, 5).max(axis=2)
    assert (largest <= 448 * scale).all()
    assert (largest > 448 * scale / 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_rounding_by_chance_is_right_on_average_and_goes_to_a_neighbour(name):
    x = jnp.broadcast_to(normal((1, 64, 2)), (2000, 64, 2))
    bits = jax.random.bits(jax.random.key(1), x.shape)
    y = np.asarray(
        arrays.dequantize(arrays.quantize(x, name, dims=(1,), block=32, bits=bits))
    )
    for column in range(2):
        assert all(len(np.unique(y[:, i, column])) <= 2 for i in range(64))
    step = 2 * HALF_STEP[name] * float(jnp.abs(x[0]).max())
    # Five standard errors of a mean of 2,000 draws of at most half a step each.
    np.testing.assert_allclose(y.mean(axis=0), x[0], atol=5 * step / 2 / 2000**0.5)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_what_is_not_finite_shows(name):
    zeros = arrays.quantize(jnp.zeros((4, 8)), name, dims=(1,))
    np.testing.assert_array_equal(arrays.dequantize(zeros), 0.0)
    for bad in (jnp.inf, jnp.nan):
        x = jnp.ones((4, 8)).at[2, 3].set(bad)
        y = arrays.dequantize(arrays.quantize(x, name, dims=(1,)))
        assert not jnp.isfinite(y[2]).any()
        assert jnp.isfinite(y[0]).all()


def test_four_bits_are_stored_in_four_bits():
    for name in ("int4", "nf4"):
        q = arrays.quantize(normal((3, 64, 5)), name, dims=(1,), block=64)
        assert q.values.dtype == jnp.uint8
        assert q.values.shape == (3, 32, 5)
        assert q.shape == (3, 64, 5)
        assert q.ndim == 3
    codes = jnp.arange(16, dtype=jnp.uint8).reshape(2, 8)
    for dim in (0, 1, -1):
        np.testing.assert_array_equal(
            arrays.unpack(arrays.pack(codes, dim), dim), codes
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_loop_over_layers_takes_one_layer_at_a_time(name):
    w_LDF = normal((3, 32, 6))
    spec = params.ParamSpec(
        (3, 32, 6), ("layers", "embed", "ffn"), (1,), "matrix", params.normal(1.0)
    )
    q = arrays.quantize_parameter(w_LDF, spec, name, "block", block=16)
    _, layers = jax.lax.scan(lambda c, q: (c, arrays.dequantize(q)), 0, q)
    np.testing.assert_array_equal(layers, arrays.dequantize(q))
    alone = arrays.quantize_parameter(w_LDF[1], spec, name, "block", block=16)
    np.testing.assert_array_equal(layers[1], arrays.dequantize(alone))


def test_a_parameter_has_scales_by_tensor_or_by_channel_of_its_spec():
    spec = params.ParamSpec(
        (2, 3, 4, 6),
        ("layers", "heads", None, "embed"),
        (1, 2),
        "matrix",
        params.normal(1.0),
    )
    w = normal(spec.shape)
    shape = lambda kind: arrays.quantize_parameter(w, spec, "int8", kind).scales.shape
    assert shape("tensor") == (2, 1, 1, 1)
    assert shape("channel") == (2, 1, 1, 6)
    with pytest.raises(ValueError, match="mxfp8 has blocks by definition"):
        arrays.quantize_parameter(w, spec, "mxfp8", "channel")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_split_array_is_quantized_where_it_lies_to_the_same_bits(name):
    x = normal((2, 64, 8))
    whole = arrays.quantize(x, name, dims=(1,), block=16)
    mesh = jaxinfra.make_mesh({"fsdp": 4, "tensor": 2})
    place = jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        quantize = jax.jit(lambda x: arrays.quantize(x, name, dims=(1,), block=16))
        parts = quantize(jax.device_put(x, place))
        back = jax.jit(arrays.dequantize)(parts)
    assert back.sharding.is_equivalent_to(place, 3)
    places = arrays.shardings(parts, place)
    assert parts.values.sharding.is_equivalent_to(places.values, 3)
    assert parts.scales.sharding.is_equivalent_to(places.scales, 3)
    np.testing.assert_array_equal(parts.values, whole.values)
    np.testing.assert_array_equal(back, arrays.dequantize(whole))


@pytest.mark.parametrize(
    ("name", "size", "block"), [("nf4", 24, 8), ("int8", 24, 24), ("int4", 12, 4)]
)
def test_no_mesh_limits_the_blocks(name, size, block):
    """Devices that share a block, or the two values of a byte, find the same bits."""
    x = normal((size, 8))
    how = {"dims": (0,), "block": block}
    whole = arrays.quantize(x, name, **how)
    mesh = jaxinfra.make_mesh({"fsdp": 4, "tensor": 2})
    place = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        quantize = jax.jit(lambda x: arrays.quantize(x, name, **how))
        parts = quantize(jax.device_put(x, place))
        back = jax.jit(arrays.dequantize)(parts)
    np.testing.assert_array_equal(parts.values, whole.values)
    np.testing.assert_array_equal(parts.scales, whole.scales)
    np.testing.assert_array_equal(back, arrays.dequantize(whole))
    if whole.values.shape[0] % 4:
        with pytest.raises(ValueError, match=r"'fsdp'.* stored in pairs; use int8"):
            arrays.shardings(parts, place)
    else:
        assert back.sharding.is_equivalent_to(place, 2)
        places = arrays.shardings(parts, place)
        assert parts.values.sharding.is_equivalent_to(places.values, 2)
        assert parts.scales.sharding.is_equivalent_to(places.scales, 2)
        assert places.scales.spec == jax.P(None, "tensor")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_quantized_arrays(name, tmp_path):
    tree = {"w": arrays.quantize(normal((4, 64)), name, dims=(1,)), "b": normal((3,))}
    saver = lifecycle.Checkpointer(tmp_path, keep=1, run_id="r", attempt=1)
    saver.save(1, dict(params.named(tree)), metadata={"config": {}, "data": {}})
    saver.close()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )
    found = restore.restore(tmp_path, 1, dict(params.named(abstract)))
    back = params.unflatten(tree, list(found.arrays.values()))
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert repr(back["w"]) == repr(tree["w"])


def test_printing_tells_format_shape_and_groups():
    q = arrays.quantize(normal((4, 64)), "int4", dims=(1,), block=16)
    assert repr(q) == "QuantizedArray(int4, [4, 64], 16 scales of 16 values each)"
    assert "QuantizedArray" in repr(jax.tree.structure(q))


def test_blocks_and_pairs_that_do_not_fit_are_errors_that_say_so():
    with pytest.raises(ValueError, match="into blocks of 48; choose a divisor of 64"):
        arrays.quantize(normal((4, 64)), "int8", dims=(1,), block=48)
    with pytest.raises(ValueError, match="is odd"):
        arrays.quantize(normal((4, 7)), "int4", dims=(1,))


def test_a_tree_is_dequantized_leaf_by_leaf():
    x = normal((4, 64))
    tree = {"a": arrays.quantize(x, "int8", dims=(1,)), "b": x}
    back = arrays.dequantize_tree(tree, jnp.bfloat16)
    assert back["b"] is x
    assert back["a"].dtype == jnp.bfloat16
