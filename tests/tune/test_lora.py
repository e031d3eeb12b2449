"""A matrix and its low-rank pair as one weight, against the matrix that they make."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tune import small

from jaxinfra import params
from jaxinfra.config import LayerConfig, LoraConfig
from jaxinfra.generate import score
from jaxinfra.models.specs import param_specs
from jaxinfra.ops import seam
from jaxinfra.quant import arrays
from jaxinfra.tune import lora, roles

SUMS = 2e-6  # float32 sums in another order, of numbers near 1
# Nine small products summed in another order through two layers, of logits near 3.
LOGITS = 2e-5

B, T, D, K, G, H, F, E, R = 2, 5, 6, 2, 3, 4, 8, 3, 2
BTD, BTF = ("batch", "length", "width"), ("batch", "length", "ffn")
HEADS = ("batch", "length", "heads", None, None)
EXPERTS = ("batch", "length", None, "ffn")
# equation, shape of x, out, the parameter's path
CONTRACTIONS = [
    ("BTD,DKGH->BTKGH", (B, T, D), HEADS, "attention/query"),
    ("BTD,DKH->BTKH", (B, T, D), HEADS[:4], "attention/key"),
    ("BTKGH,KGHD->BTD", (B, T, K, G, H), BTD, "attention/out"),
    ("BTD,DF->BTF", (B, T, D), BTF, "ffn/up"),
    ("BTF,FD->BTD", (B, T, F), BTD, "ffn/down"),
]
OF_EXPERTS = [
    ("BTD,EDF->BTEF", (B, T, D), EXPERTS, "ffn/up"),
    ("BTEF,EFD->BTD", (B, T, E, F), BTD, "ffn/down"),
]
MODEL = dataclasses.replace(
    small.MODEL, width=D, ffn_width=F, num_heads=K * G, num_kv_heads=K, head_dim=H
)


def numbers(key, shape):
    return jax.random.normal(jax.random.key(key), shape, jnp.float32)


def of_path(specs, path):
    return specs[path.split("/")[0]][path.split("/")[1]]


def pair_of(spec, rank, key=1):
    wanted = lora.pair_specs(spec, rank)
    return {
        name: numbers(key + i, s.shape) for i, (name, s) in enumerate(wanted.items())
    }


def multiplied_out(spec, pair, scale):
    """The matrix that a pair stands for, by plain numpy, of a matrix with one stack."""
    a, b = (np.asarray(pair[name], np.float64) for name in ("a", "b"))
    if "experts" in spec.axes:
        products = [np.tensordot(x, y, axes=1) for x, y in zip(a, b, strict=True)]
        return scale * np.stack(products)
    return scale * np.tensordot(a, b, axes=1)


@pytest.mark.parametrize(
    ("case", "layer"),
    [(c, LayerConfig()) for c in CONTRACTIONS]
    + [(c, LayerConfig(feed_forward="experts")) for c in OF_EXPERTS],
    ids=lambda x: x[0] if isinstance(x, tuple) else x.feed_forward,
)
def test_the_pair_is_contracted_as_the_matrix_that_it_makes(case, layer):
    equation, x_shape, out, path = case
    cfg = dataclasses.replace(
        MODEL, suffix=(layer,), repeats=0, num_experts=E, experts_per_token=1
    )
    spec = of_path(param_specs(cfg)["suffix"][0], path)
    with small.mesh_of({}) as layout:
        einsum = seam.make_einsum(small.POLICY, layout.params)
        place = lambda x: jax.device_put(x, jax.NamedSharding(layout.mesh, jax.P()))
        w, x = place(numbers(0, spec.shape)), place(numbers(9, x_shape))
        pair = jax.tree.map(place, pair_of(spec, R))
        weight = lora.join(w, pair, spec, LoraConfig(rank=R, alpha=3.0))
        found = einsum(equation, x, weight, out=out)
        merged = lora.merge({"w": weight})["w"]
    plain = np.asarray(w, np.float64) + multiplied_out(spec, pair, 3.0 / R)
    np.testing.assert_allclose(merged, plain, atol=SUMS * 10)
    expected = np.einsum(equation, np.asarray(x, np.float64), plain)
    np.testing.assert_allclose(found, expected, rtol=SUMS * 10, atol=SUMS * 100)


def test_training_begins_at_the_base():
    specs = param_specs(MODEL)
    found = roles.roles(specs, small.config(lora=LoraConfig(rank=R)))
    assert found["pattern"][0]["attention"]["query"] == "adapted"
    pair = lora.pair_specs(specs["pattern"][0]["attention"]["query"], R)
    with small.mesh_of({}) as layout:
        made = params.initialize(
            pair, jax.random.key(0), layout=layout, dtype=jnp.float32
        )
    assert np.asarray(made["b"]).any() == np.False_
    np.testing.assert_allclose(np.std(made["a"]), D**-0.5, rtol=0.5)


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.slow
def test_each_row_has_the_adapters_that_it_asks_for(mesh):
    """The base, a pair of rank 2 on all matrices, two rows of one of rank 3 on some."""
    specs = param_specs(small.MODEL)
    ids_BT = np.arange(32).reshape(4, 8) * 7 % small.MODEL.vocab_size
    settings = [
        LoraConfig(rank=2, alpha=4.0),
        LoraConfig(rank=3, alpha=1.0, targets="up down"),
    ]
    with small.mesh_of(mesh) as layout:
        base = small.weights(layout)
        logits = score.make_logits(small.MODEL, policy=small.POLICY, layout=layout)
        trees = [small.pairs(specs, s, layout, key=s.rank) for s in settings]
        adapters = list(zip(trees, settings, strict=True))
        rows = np.array([-1, 0, 1, 1])
        found = logits(lora.by_row(specs, base, adapters, rows, layout), ids_BT)
        alone = [small.merged(specs, base, *adapter) for adapter in adapters]
        expected = [logits(tree, ids_BT) for tree in (*alone, base)]
    for row, number in enumerate(rows):
        np.testing.assert_allclose(found[row], expected[number][row], atol=LOGITS)
    assert np.abs(expected[0] - expected[1]).max() > 0.1


@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
@pytest.mark.slow
def test_over_a_base_in_few_bits_the_pair_is_added_to_what_it_stands_for(form):
    spec = param_specs(small.MODEL)["pattern"][0]["ffn"]["up"]
    with small.mesh_of({}) as layout:
        w = small.weights(layout)["pattern"][0]["ffn"]["up"]
        q = arrays.quantize_parameter(w, spec, form, "block", block=8)
        pair = pair_of(spec, R)
        merged = lora.merge(lora.join(q, pair, spec, LoraConfig(rank=R, alpha=3.0)))
        plain = arrays.dequantize(q)
        assert merged.dtype == jnp.float32
        products = np.einsum("Ldr,Lrf->Ldf", *map(np.asarray, pair.values()))
        np.testing.assert_allclose(merged, plain + 3.0 / R * products, atol=SUMS * 10)
        assert np.abs(np.asarray(plain - w)).max() > 1e-4, "few bits must show"
