"""The seam's einsum against jnp.einsum, on split weights."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra import mesh, precision, sharding
from jaxinfra.ops import seam
from jaxinfra.plan import program, wires

FLOAT32_ROUNDING = 1e-5  # sums of up to 24 terms of size 1, in another order
# Optimising these programs takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0}
B, T, D, K, G, H, F = 4, 5, 6, 2, 3, 8, 12

# equation -> (shape of x, names of x, shape of w, names of w, names out)
x_names, w_names = ("batch", "length"), ("embed", "heads")
CASES = {
    "BTD,DKGH->BTKGH": (
        ((B, T, D), (*x_names, "width")),
        ((D, K, G, H), (*w_names, None, None)),
        (*x_names, "heads", None, None),
    ),
    "BTKGH,KGHD->BTD": (
        ((B, T, K, G, H), (*x_names, "heads", None, None)),
        ((K, G, H, D), ("heads", None, None, "embed")),
        (*x_names, "width"),
    ),
    "BTF,FD->BTD": (
        ((B, T, F), (*x_names, "ffn")),
        ((F, D), ("ffn", "embed")),
        (*x_names, "width"),
    ),
}


def run(equation, policy_name, *, zero=3):
    """{result, dx, dw} of the seam, and numpy's x, w, g."""
    x_is, w_is, out_names = CASES[equation]
    policy = precision.policy(policy_name)
    rules = sharding.make_layout(jax.sharding.get_mesh(), zero=zero).params
    einsum = seam.make_einsum(policy, rules)
    rng = np.random.default_rng(0)
    out_shape = np.einsum(equation, np.ones(x_is[0]), np.ones(w_is[0])).shape
    shapes = (x_is, w_is, (out_shape, out_names))
    # bfloat16 values, so that casting x, w and g loses nothing.
    arrays = [
        rng.normal(size=s).astype(jnp.bfloat16).astype(np.float32) for s, _ in shapes
    ]
    placed = [
        jax.device_put(array, sharding.spec(rules, *names))
        for array, (_, names) in zip(arrays, shapes, strict=True)
    ]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(x, w, g):
        y, pull = jax.vjp(
            lambda x, w: einsum(equation, x, w, out=out_names),
            x.astype(policy.compute),
            w,
        )
        dx, dw = pull(g.astype(y.dtype))
        return {"y": y, "dx": dx, "dw": dw}

    got = both(*placed)
    for name, like in (("y", placed[2]), ("dx", placed[0]), ("dw", placed[1])):
        assert jax.typeof(got[name]).sharding.spec == jax.typeof(like).sharding.spec
    return got, arrays


def exact(equation, arrays):
    x, w, g = (array.astype(np.float64) for array in arrays)
    x_dims, w_dims, out_dims = equation.replace("->", ",").split(",")
    return {
        "y": np.einsum(equation, x, w),
        "dx": np.einsum(f"{out_dims},{w_dims}->{x_dims}", g, w),
        "dw": np.einsum(f"{x_dims},{out_dims}->{w_dims}", x, g),
    }


@pytest.mark.parametrize("equation", CASES)
def test_values_and_gradients_are_einsum_on_fsdp_and_tensor(equation, four_devices):
    got, arrays = run(equation, "float32")
    expected = exact(equation, arrays)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("zero", [1, 3])
def test_bfloat16_gradients_of_float32_masters_are_reduced_in_float32(
    zero, four_devices
):
    equation = "BTF,FD->BTD"
    got, arrays = run(equation, "bfloat16", zero=zero)
    assert {name: str(array.dtype) for name, array in got.items()} == {
        "y": "bfloat16",
        "dx": "bfloat16",
        "dw": "float32",
    }
    # Rounded to bfloat16 anywhere on the way, this would be off by 1e-2.
    expected = exact(equation, arrays)["dw"]
    np.testing.assert_allclose(got["dw"], expected, atol=FLOAT32_ROUNDING)


def test_the_gathered_copy_is_bfloat16_so_half_the_bytes_travel(four_devices):
    rules = sharding.make_layout(four_devices).params
    w_FD = jax.device_put(
        np.ones((F, D), np.float32), sharding.spec(rules, "ffn", "embed")
    )
    policy = precision.policy("bfloat16")
    jaxpr = jax.make_jaxpr(lambda w: seam.gather(w, policy))(w_FD)
    steps = [equation.primitive.name for equation in jaxpr.eqns]
    assert steps == ["convert_element_type", "reshard"]


def test_gpus_sum_at_once_what_others_sum_by_axis(monkeypatch):
    """The same gradient, laid out alike."""
    found = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(mesh, "platform", lambda platform=platform: platform)
        here = mesh.make_mesh({"data": 2, "fsdp": 2}, devices=jax.devices()[:4])
        with jax.set_mesh(here):
            found.append(run("BTF,FD->BTD", "float32")[0]["dw"])
    assert found[0].sharding == found[1].sharding
    np.testing.assert_allclose(*found, atol=FLOAT32_ROUNDING)


def test_a_gradient_crosses_fsdp_first_and_data_with_what_is_kept():
    """Bytes on the wire of the compiled program: nothing whole is summed over data."""
    here = mesh.make_mesh({"data": 2, "fsdp": 4})
    with jax.set_mesh(here):
        rules = sharding.make_layout(here).params
        einsum = seam.make_einsum(precision.policy("float32"), rules)
        placed = lambda *names: jax.NamedSharding(here, sharding.spec(rules, *names))
        x = jax.ShapeDtypeStruct(
            (8, T, F), jnp.float32, sharding=placed("batch", "length", "ffn")
        )
        w = jax.ShapeDtypeStruct(
            (F, 4 * D), jnp.float32, sharding=placed("ffn", "embed")
        )

        def gradient(x, w):
            out = ("batch", "length", "width")
            y = lambda w: jnp.sum(einsum("BTF,FD->BTD", x, w, out=out) ** 2)
            return jax.grad(y)(w)

        text = jax.jit(gradient).lower(x, w).compile().as_text()
    compiled, moved = program.parse(text), Counter()
    for computation in compiled.computations:
        for line in compiled[computation]:
            if line.op.startswith(("all-reduce", "reduce-scatter")):
                wire = wires.of(line, computation, dict(here.shape))
                moved[wire.axes] += wire.bytes
    kept = 4 * F * D  # float32, a fourth of w
    assert set(moved) == {"fsdp", "data"}
    assert moved["data"] == 2 * kept * (1 / 2)
