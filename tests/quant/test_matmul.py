"""Low-precision matmuls against numpy, on one device and on eight."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxinfra
from jaxinfra import precision, sharding
from jaxinfra.ops import seam
from jaxinfra.quant import matmul
from jaxinfra.quant.matmul import Weight
from jaxinfra.quant.recipe import _RECIPES

B, T, D, F = 8, 32, 64, 96
# The compute dtype is float32 here, so what differs is the order of sums alone.
SUMMED = {"rtol": 1e-5, "atol": 1e-4}
POLICY = precision.policy("float32")
RULES = sharding.Rules()
EQUATION, OUT = "BTD,DF->BTF", ("batch", "length", "ffn")


def operands(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (B, T, D)) * jnp.exp2(jnp.arange(D) % 5)
    w = jax.random.normal(keys[1], (D, F)) / 8 * jnp.exp2(jnp.arange(F) % 3)
    g = jax.random.normal(keys[2], (B, T, F)) * 1e-3
    return x, w, g


def weight(w, *, seed=None, rows=None, scales=None):
    """`w` as the einsum wants it."""
    return Weight(w, jnp.zeros((3, 3)), scales, seed, rows)


@functools.cache
def compiled(recipe, native, equation, out):
    """(x, w, g) -> (y, dx, dw, figures) of one matmul."""
    plain = seam.make_einsum(POLICY, RULES)
    einsum = matmul.low_precision_einsum(plain, recipe, POLICY, RULES, native=native)

    def loss(x, w, g):
        return jnp.sum(einsum(equation, x, w, out=out) * g)

    def all_of(x, w, g):
        y = einsum(equation, x, w, out=out)
        dx, dw = jax.grad(loss, (0, 1))(x, w, g)
        return y, dx, dw.array, dw.probe

    return jax.jit(all_of)


def run(recipe, x, w, g, mesh=None, *, native=False, equation=EQUATION, out=OUT):
    """What `compiled` gives, on `mesh`."""
    mesh = mesh or jaxinfra.make_mesh({}, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        batch = jax.P(("data", "fsdp", "expert"), *(None,) * (x.ndim - 1))
        put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))
        rest = [None] * (g.ndim - 2)
        tail = "tensor" if out[-1] == "ffn" else None
        arrays = (
            put(x, batch),
            dataclasses.replace(w, array=put(w.array, jax.P("fsdp", "tensor"))),
            put(g, jax.P(("data", "fsdp", "expert"), *rest, tail)),
        )
        found = compiled(recipe, native, equation, out)(*arrays)
        return jax.tree.map(np.asarray, found)


def recipe_of(name, **changes):
    return dataclasses.replace(_RECIPES[name], **changes)


def fp8(a, dtype, largest):
    """`a` rounded to fp8 by one scale, by numpy and ml_dtypes."""
    scale = np.float32(np.abs(a).max()) / np.float32(largest)
    return (a / scale).astype(dtype).astype(np.float32) * scale


def int8(a, axis):
    scale = np.abs(a).max(axis=axis, keepdims=True) / np.float32(127)
    return np.round(a / scale) * scale


def mx(a, axis):
    """`a` in blocks of 32 along `axis`, scales rounded up to powers of two."""
    a = np.moveaxis(np.asarray(a), axis, -1)
    blocks = a.reshape(*a.shape[:-1], -1, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(largest / 448))
    rounded = (blocks / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.moveaxis((rounded * scale).reshape(a.shape), -1, axis)


def test_fp8_is_numpys_product_of_rounded_operands():
    x, w, g = map(np.asarray, operands())
    y, dx, dw, _ = run(recipe_of("fp8"), x, weight(w), g)
    e4m3, e5m2 = (ml_dtypes.float8_e4m3fn, 448), (ml_dtypes.float8_e5m2, 57344)
    x, w, g = fp8(x, *e4m3), fp8(w, *e4m3), fp8(g, *e5m2)
    np.testing.assert_allclose(y, np.einsum("btd,df->btf", x, w), **SUMMED)
    np.testing.assert_allclose(dx, np.einsum("btf,df->btd", g, w), **SUMMED)
    np.testing.assert_allclose(dw, np.einsum("btd,btf->df", x, g), **SUMMED)


def test_int8_is_numpys_product_with_scales_folded_into_the_gradient():
    x, w, g = map(np.asarray, operands())
    y, dx, dw, _ = run(recipe_of("int8", by_chance=False), x, weight(w), g)
    w_scale = np.abs(w).max(axis=0) / np.float32(127)
    x_scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    x, w = int8(x, -1), int8(w, 0)
    np.testing.assert_allclose(y, np.einsum("btd,df->btf", x, w), **SUMMED)
    for_x = int8(g * w_scale, -1)
    np.testing.assert_allclose(
        dx, np.einsum("btf,df->btd", for_x, w / w_scale), **SUMMED
    )
    for_w = int8(g * x_scale, (0, 1))
    np.testing.assert_allclose(
        dw, np.einsum("btd,btf->df", x / x_scale, for_w), **SUMMED
    )


def test_mxfp8_has_blocks_along_what_each_matmul_sums_over():
    x, w, g = map(np.asarray, operands())
    y, dx, dw, _ = run(recipe_of("mxfp8"), x, weight(w), g)
    product = np.einsum("btd,df->btf", mx(x, 2), mx(w, 0))
    np.testing.assert_allclose(y, product, **SUMMED)
    product = np.einsum("btf,df->btd", mx(g, 2), mx(w, 1))
    np.testing.assert_allclose(dx, product, **SUMMED)
    product = np.einsum("btd,btf->df", mx(x, 1), mx(g, 1))
    np.testing.assert_allclose(dw, product, **SUMMED)


@pytest.mark.parametrize("name", ["fp8", "int8", "mxfp8"])
def test_the_backward_matmuls_can_stay_in_the_compute_dtype(name):
    x, w, g = operands()
    y, dx, dw, probe = run(recipe_of(name, backward=None), x, weight(w), g)
    low_y, *_ = run(recipe_of(name), x, weight(w), g)
    np.testing.assert_array_equal(y, low_y)
    np.testing.assert_allclose(dx, np.einsum("btf,df->btd", g, w), **SUMMED)
    np.testing.assert_allclose(dw, np.einsum("btd,btf->df", x, g), **SUMMED)
    assert (probe[2] == 0).all()


@pytest.mark.parametrize("name", ["fp8", "int8", "mxfp8"])
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.slow
def test_a_mesh_changes_no_number(name, sizes):
    x, w, g = operands()
    rows, seed = jnp.arange(B, dtype=jnp.float32), jnp.float32(5)
    low = weight(w, seed=seed, rows=rows)
    one = run(recipe_of(name), x, low, g)
    many = run(recipe_of(name), x, low, g, jaxinfra.make_mesh(sizes))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, **SUMMED)


@pytest.mark.parametrize("name", ["fp8", "int8", "mxfp8"])
def test_devices_with_rows_of_their_own_have_the_scales_of_all_rows(name):
    """As the stages of a pipeline, where each device adds up its own part of dw."""
    x, w, g = operands()
    rows, seed = jnp.arange(B, dtype=jnp.float32), jnp.float32(5)
    one = run(recipe_of(name), x, weight(w, seed=seed, rows=rows), g)
    rules = dataclasses.replace(RULES, batch=(), rows=(), embed=())
    plain = seam.make_einsum(POLICY, rules)
    einsum = matmul.low_precision_einsum(
        plain, recipe_of(name), POLICY, rules, native=False
    )

    def body(x, w, g, rows):
        low = weight(w, seed=seed, rows=rows)
        product = lambda x, low: einsum(EQUATION, x, low, out=OUT)
        y, pull = jax.vjp(product, x, low)
        dx, dlow = pull(jax.reshard(g, jax.typeof(y).sharding.spec))
        return y, dx, jax.lax.psum(dlow.array, "data"), dlow.probe[:, 0]

    with jax.set_mesh(jaxinfra.make_mesh({"data": 4, "tensor": 2})):
        split, whole = jax.P("data"), jax.P()
        mapped = jax.shard_map(
            body,
            in_specs=(split, whole, split, split),
            out_specs=(split, split, whole, whole),
            axis_names={"data"},
            check_vma=False,
        )
        found = jax.jit(mapped)(x, w, g, rows)
    for a, b in zip(found, (*one[:3], one[3][:, 0]), strict=True):
        np.testing.assert_allclose(a, b, **SUMMED)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_the_units_multiply_the_same_codes_as_the_wider_type(name):
    x, w, g = operands()
    recipe = recipe_of(name)
    for a, b in zip(
        run(recipe, x, weight(w), g),
        run(recipe, x, weight(w), g, native=True),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, **SUMMED)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_what_is_lowered_for_units_multiplies_8_bits(name):
    x, w, g = operands()
    recipe = recipe_of(name)
    mesh = jaxinfra.make_mesh({}, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        plain = seam.make_einsum(POLICY, RULES)
        einsum = matmul.low_precision_einsum(plain, recipe, POLICY, RULES, native=True)
        loss = lambda x, w: jnp.sum(einsum(EQUATION, x, w, out=OUT) * g)
        text = jax.jit(jax.grad(loss, (0, 1))).lower(x, weight(w)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 2  # the forward product is not part of its own gradient
    code = {"fp8": "xf8E", "int8": "xi8"}[name]
    assert all(line.count(code) >= 2 for line in dots)


def test_more_products_than_int32_can_sum_are_summed_in_a_float(monkeypatch):
    monkeypatch.setattr(matmul, "_MOST_TERMS", D)
    compiled.cache_clear()
    x, w, g = operands()
    a = run(recipe_of("int8"), x, weight(w), g, native=True)
    monkeypatch.undo()
    compiled.cache_clear()
    b = run(recipe_of("int8"), x, weight(w), g, native=True)
    np.testing.assert_allclose(a[2], b[2], **SUMMED)


def test_gradients_rounded_by_chance_are_right_on_average():
    x, w, g = operands()
    rows = jnp.arange(B, dtype=jnp.float32)
    recipe = recipe_of("int8")
    exact = np.einsum("btd,btf->df", int8(np.asarray(x), -1), g)

    def error(seeds):
        found = [
            run(recipe, x, weight(w, seed=jnp.float32(s), rows=rows), g)[2]
            for s in seeds
        ]
        return np.sqrt(np.mean((np.mean(found, axis=0) - exact) ** 2))

    # 16 draws have a quarter of one draw's error, were they not the same draw or off.
    assert error(range(16)) < 0.35 * error([0])


def test_rounding_by_chance_goes_with_the_row_and_not_with_its_place():
    x, w, g = operands()
    order = jnp.array([3, 1, 7, 0, 2, 6, 5, 4])
    rows = jnp.arange(B, dtype=jnp.float32)
    recipe, seed = recipe_of("int8"), jnp.float32(9)
    _, dx, dw, _ = run(recipe, x, weight(w, seed=seed, rows=rows), g)
    moved = weight(w, seed=seed, rows=rows[order])
    _, dx_moved, dw_moved, _ = run(recipe, x[order], moved, g[order])
    np.testing.assert_array_equal(dx[order], dx_moved)
    np.testing.assert_allclose(dw, dw_moved, **SUMMED)


def test_experts_and_heads_are_multiplied_as_well():
    """More than one dim that is summed over, one that both operands go on with."""
    rng = np.random.default_rng(0)
    E, H = 4, 32
    x = rng.normal(size=(B, T, E, H)).astype(np.float32)
    w = rng.normal(size=(E, H, D)).astype(np.float32)
    g = rng.normal(size=(B, T, D)).astype(np.float32)
    exact = [
        np.einsum("bteh,ehd->btd", x, w),
        np.einsum("btd,ehd->bteh", g, w),
        np.einsum("bteh,btd->ehd", x, g),
    ]
    mesh = jaxinfra.make_mesh({"fsdp": 2}, devices=jax.devices()[:2])
    # Root mean squares: 3 bits round by 2.7% of a value, 2 bits by 5.3%, int8's steps,
    # 1/127 of the largest of about 100, by 0.7%.
    e4m3, e5m2, int8_step = 0.0265, 0.0531, 0.0069
    expected = {
        "fp8": (math.hypot(e4m3, e4m3), math.hypot(e4m3, e5m2), math.hypot(e4m3, e5m2)),
        "int8": (math.hypot(int8_step, int8_step),) * 3,
        "mxfp8": (math.hypot(e4m3, e4m3),) * 3,
    }
    for name, errors in expected.items():
        found = run(
            recipe_of(name), x, dataclasses.replace(weight(jnp.asarray(w))), g, mesh,
            equation="BTEH,EHD->BTD", out=("batch", "length", "width"),
        )  # fmt: skip
        for a, b, about in zip(found[:3], exact, errors, strict=True):
            error = np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))
            assert 0.9 * about < error < 1.1 * about, name


def test_figures_tell_what_a_fixed_scale_loses():
    x, w, g = operands()
    recipe = recipe_of("fp8", is_delayed=True)
    largest = [float(jnp.abs(a).max()) for a in (x, w, g)]
    fits = jnp.array(largest) / jnp.array([448.0, 448.0, 57344.0])
    *_, probe = run(recipe, x, weight(w, scales=fits), g)
    np.testing.assert_allclose(probe[:, 0], largest, rtol=1e-6)
    assert (probe[:, 1] == 0).all()
    *_, probe = run(recipe, x, weight(w, scales=fits / 4), g)
    over = [np.mean(np.abs(a) > top / 4) for a, top in zip((x, w, g), largest)]
    np.testing.assert_allclose(probe[:, 1], over, rtol=1e-5)
    # What is below half of the smallest number, 2^-9 or 2^-16, becomes zero.
    wide = fits * jnp.array([2.0**13, 2.0**13, 2.0**26])
    *_, probe = run(recipe, x, weight(w, scales=wide), g)
    half = wide * jnp.array([2.0**-10, 2.0**-10, 2.0**-17])
    lost = [np.mean(np.abs(a) <= least) for a, least in zip((x, w, g), half)]
    np.testing.assert_allclose(probe[:, 2], lost, rtol=1e-5)
    assert min(lost) > 0.01
