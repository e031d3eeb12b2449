"""The parts of a layer's pull-back do together what the whole does, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxinfra.parallel import phases

B, T, D, F = 2, 5, 8, 12


def layer(params, x_BTD, context):
    h_BTD = x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, -1, keepdims=True) + 1e-6)
    h_BTD = h_BTD * params["scale"]
    up_BTF = checkpoint_name(jnp.einsum("BTD,DF->BTF", h_BTD, params["up"]), "ffn_in")
    gate_BTF = jnp.einsum("BTD,DF->BTF", h_BTD, params["gate"])
    out_BTD = jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, params["down"])
    kept_BTD = jax.random.bernoulli(context["key"], 0.5, out_BTD.shape)
    return x_BTD + jnp.where(kept_BTD, out_BTD, 0) * jnp.cos(context["angle"])


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
        y, pull = jax.vjp(lambda params, x: layer(params, x, context), params, x)
        return y, *pull(dy)

    @jax.jit
    def in_parts(params, x, dy, context):
        parts = phases.cut(layer, params, x, context, remat=remat, split=split)
        y, values = parts.keep(params, x, context)
        values, x = jax.lax.optimization_barrier((values, x))
        dx, made = parts.back(params, context, values, dy)
        if split:
            made = parts.weigh(params, context, made)
        return (y, made, dx), values

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
    _, kept = parts.keep(params, x, context)
    _, left = parts.back(params, context, kept, dy)
    assert one > 0
    assert flops(parts.keep, params, x, context) == one
    in_parts = flops(parts.back, params, context, kept, dy)
    assert (
        in_parts + flops(parts.weigh, params, context, left)
        == flops(
            lambda params, x: jax.vjp(
                lambda params, x: layer(params, x, context), params, x
            )[1](dy),
            params,
            x,
        )
        - one
    )


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="must be none, full, dots, save:NAME"):
        phases.cut(layer, *arguments()[:2], arguments()[3], remat="all", split=False)
