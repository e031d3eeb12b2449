"""The parts of a layer's pull-back do together what the whole does, to the bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from ops import kernels_anywhere

from jaxinfra.mesh import make_mesh
from jaxinfra.ops import attention
from jaxinfra.ops.seam import Context
from jaxinfra.parallel import phases
from jaxinfra.sharding import Rules, spec

B, T, D, F = 2, 5, 8, 12


def layer(params, x_BTD, context):
    h_BTD = x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, -1, keepdims=True) + 1e-6)
    h_BTD = h_BTD * params["scale"]
    up_BTF = checkpoint_name(jnp.einsum("BTD,DF->BTF", h_BTD, params["up"]), "ffn_in")
    gate_BTF = jnp.einsum("BTD,DF->BTF", h_BTD, params["gate"])
    out_BTD = jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, params["down"])
    kept_BTD = jax.random.bernoulli(context["key"], 0.5, out_BTD.shape)
    y_BTD = x_BTD + jnp.where(kept_BTD, out_BTD, 0) * jnp.cos(context["angle"])
    return y_BTD, {"largest": jnp.max(jnp.abs(up_BTF)), "rows": jnp.float32(B)}


def arguments():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "scale": jnp.linspace(0.5, 1.5, D),
        "up": jax.random.normal(keys[0], (D, F)),
        "gate": jax.random.normal(keys[1], (D, F)),
        "down": jax.random.normal(keys[2], (F, D)),
    }
    x_BTD, dy_BTD = (jax.random.normal(key, (B, T, D)) for key in keys[3:])
    return params, x_BTD, dy_BTD, {"key": keys[0], "angle": jnp.float32(0.3)}


def flops(function, *args):
    """Of the matmuls of a traced function."""
    count = 0
    for eqn in jax.make_jaxpr(function)(*args).jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        for each in (
            inner.eqns if inner is not None and hasattr(inner, "eqns") else [eqn]
        ):
            if each.primitive.name == "dot_general":
                count += each.invars[0].aval.size * each.outvars[0].aval.size
    return count


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("remat", "kept"), [("none", None), ("full", 1), ("dots", 3), ("save:ffn_in", 2)]
)
def test_the_parts_make_what_the_whole_makes(remat, kept, split):
    params, x, dy, context = arguments()

    @jax.jit
    def whole(params, x, dy, context):
        of_both = lambda params, x: layer(params, x, context)
        y, pull, told = jax.vjp(of_both, params, x, has_aux=True)
        return y, told, *pull(dy)

    @jax.jit
    def in_parts(params, x, dy, context):
        parts = phases.cut(layer, params, x, context, remat=remat, split=split)
        y, told, values = parts.keep(params, x, context)
        values, x = jax.lax.optimization_barrier((values, x))
        dx, made = parts.back(params, context, values, dy)
        if split:
            made = parts.weigh(params, context, made)
        return (y, told, made, dx), values

    found, values = in_parts(params, x, dy, context)
    jax.tree.map(np.testing.assert_array_equal, found, whole(params, x, dy, context))
    if kept is not None:
        assert len(values) == kept
    assert not any(v.shape == (D, F) for v in values), "no parameter is kept"


def test_no_product_is_made_twice():
    """Three matmuls: once forward, twice back, of which one is the weights'."""
    params, x, dy, context = arguments()
    one = flops(layer, params, x, context)
    parts = phases.cut(layer, params, x, context, remat="none", split=True)
    _, _, kept = parts.keep(params, x, context)
    _, left = parts.back(params, context, kept, dy)
    assert one > 0
    assert flops(parts.keep, params, x, context) == one
    in_parts = flops(parts.back, params, context, kept, dy)
    assert (
        in_parts + flops(parts.weigh, params, context, left)
        == flops(
            lambda params, x: jax.vjp(
                lambda params, x: layer(params, x, context)[0], params, x
            )[1](dy),
            params,
            x,
        )
        - one
    )


def test_no_product_within_a_shard_map_is_made_twice():
    """Where the gradients of both its inputs are made of one product."""

    @jax.custom_vjp
    def inside(x, w):
        return jnp.tanh(x @ w)

    def back(kept, dy):
        x, w = kept
        both = jnp.exp(dy @ w)  # as an exchange, or a gradient by an expert
        return both, x.T @ both

    inside.defvjp(lambda x, w: (inside(x, w), (x, w)), back)

    def layer(params, x, context):
        mapped = jax.shard_map(
            inside, in_specs=(jax.P(), jax.P()), out_specs=jax.P(), check_vma=False
        )
        return x + mapped(x, params["w"]), ()

    x, params = jnp.ones((3, 8)), {"w": jnp.ones((8, 8)) / 9}
    products = lambda f, *args: str(jax.make_jaxpr(f)(*args)).count("dot_general")
    with jax.set_mesh(make_mesh({}, devices=jax.devices()[:1])):
        parts = phases.cut(layer, params, x, {}, remat="none", split=True)
        y, _, kept = parts.keep(params, x, {})
        _, left = parts.back(params, {}, kept, y)
        made = products(parts.back, params, {}, kept, y)
        assert made + products(parts.weigh, params, {}, left) == 2


def attention_layer(kernel):
    """x + attention(x), by a kernel that runs in a shard_map."""
    attend = attention.make_attend(Rules(), kernel=kernel)

    def layer(params, x_BTD, context):
        def project(name, equation, *dims):
            out = spec(Rules(), "batch", "length", "heads", *dims)
            return jnp.einsum(equation, x_BTD, params[name], out_sharding=out)

        q = project("query", "BTD,DKGH->BTKGH", None, None)
        k, v = (project(name, "BTD,DKH->BTKH", None) for name in ("key", "value"))
        a, _ = attend(q, k, v, Context(None), None, window=0, softcap=0.0)
        y = jnp.einsum("BTKGH,KGHD->BTD", a, params["out"], out_sharding=jax.P())
        return x_BTD + y, ()

    return layer


def kernels(jaxpr):
    """How often a kernel stands in a program."""
    names = ("pallas_call", "dot_product_attention_fwd_wrapper",
             "dot_product_attention_bwd_wrapper")  # fmt: skip
    found = sum(eqn.primitive.name in names for eqn in jaxpr.eqns)
    inner = jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns])
    inner = (getattr(x, "jaxpr", x) for x in inner)
    return found + sum(kernels(x) for x in inner if isinstance(x, core.Jaxpr))


@pytest.mark.parametrize(("kernel", "calls"), [("xla", 0), ("splash", 1), ("cudnn", 1)])
@pytest.mark.parametrize(
    ("sizes", "split"), [({}, False), ({"data": 2, "tensor": 2}, True)]
)
def test_what_a_kernel_made_is_kept_by_name(kernel, calls, sizes, split, monkeypatch):
    """Once, with its sums; so it does not run again, and gradients are the same."""
    kernels_anywhere.allow(monkeypatch)
    rows, length, width, K, G, H = 2, 128, 16, 2, 2, 8
    shapes = {
        "query": (width, K, G, H),
        "key": (width, K, H),
        "value": (width, K, H),
        "out": (K, G, H, width),
    }
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
    params = {name: draw(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    x, layer = draw(9, (rows, length, width)), attention_layer(kernel)

    def cut(remat):
        """(what is kept, kernels of the backward pass, its results)"""
        parts = phases.cut(layer, params, x, {}, remat=remat, split=split)

        def back(params, values, y):
            dx, made = parts.back(params, {}, values, y)
            return dx, parts.weigh(params, {}, made) if split else made

        y, _, values = jax.jit(parts.keep)(params, x, {})
        program = jax.make_jaxpr(back)(params, values, y)
        made = jax.jit(back)(params, values, y)
        return sorted(v.size for v in values), kernels(program.jaxpr), made

    devices = jax.devices()[: math.prod(sizes.values())]
    with jax.set_mesh(make_mesh(sizes, devices=devices)):
        again, kept = cut("full"), cut("save:attention")
        assert cut("save:ffn_in")[0] == again[0] == [x.size]
        result, sums = rows * length * K * G * H, rows * length * K * G
        assert kept[0] == sorted([x.size, result, *[sums] * calls])
        assert (again[1], kept[1]) == (2 * calls, calls)
        jax.tree.map(np.testing.assert_array_equal, kept[2], again[2])


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="must be none, full, dots, save:NAME"):
        phases.cut(layer, *arguments()[:2], arguments()[3], remat="all", split=False)
