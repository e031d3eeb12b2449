"""Parameters from specs: the same on every mesh, padded, counted, tabled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra import dry_run, precision, sharding
from jaxinfra import mesh as mesh_lib
from jaxinfra import params as params_lib
from jaxinfra.config import ModelConfig
from jaxinfra.models import transformer
from jaxinfra.ops import attention, loss, seam
from jaxinfra.params import ParamSpec, constant, normal
from jaxinfra.train import objective

REDUCTION_ORDER = 1e-5  # gradients of size 1, summed over devices in another order
V = 257
CFG = ModelConfig(
    vocab_size=V,
    width=8,
    ffn_width=12,
    num_heads=8,
    num_kv_heads=4,
    head_dim=2,
    repeats=2,
)


def on_mesh(sizes, zero=3):
    count = int(np.prod(list(sizes.values())))
    mesh = mesh_lib.make_mesh(sizes, devices=jax.devices()[:count])
    return sharding.make_layout(mesh, zero=zero)


def small_specs(*, head=False):
    """One parameter of each kind: a whole model's would only compile longer."""
    table = ("vocab", "embed")
    specs = {
        "embedding": ParamSpec((V, 8), table, (), "embedding", normal(1.0)),
        "scale": ParamSpec((8,), (None,), (), "vector", constant(1.0)),
        "up": ParamSpec((8, 8), ("embed", "ffn"), (0,), "matrix", normal(2.0)),
    }
    specs["stack"] = specs["up"].stacked(2)
    if head:
        specs["head"] = ParamSpec((V, 8), table, (1,), "head", normal(1.0))
    return specs


def initialize(sizes, specs, zero=3, seed=0):
    """(layout, parameters)."""
    layout = on_mesh(sizes, zero)
    with jax.set_mesh(layout.mesh):
        return layout, params_lib.initialize(
            specs, jax.random.key(seed), layout=layout, dtype=jnp.dtype("float32")
        )


@pytest.mark.parametrize(
    ("sizes", "zero"),
    [
        ({"data": 8}, 3),
        ({"fsdp": 8}, 3),
        ({"fsdp": 2, "tensor": 4}, 3),
        ({"fsdp": 2}, 0),
    ],
)
def test_parameters_are_bitwise_the_same_on_every_mesh(sizes, zero):
    specs = small_specs(head=True)
    _, one = initialize({}, specs)
    layout, many = initialize(sizes, specs, zero)
    wanted = params_lib.shardings(specs, layout, layout.params)
    for (path, a), (_, b), (_, place) in zip(
        *map(params_lib.named, (one, many, wanted)), strict=True
    ):
        assert b.sharding == place, path
        a, b = np.asarray(a), np.asarray(b)
        if path in ("embedding", "head"):
            assert not b[V:].any(), path  # padding
            b = b[:V]
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_the_seed_changes_all_random_parameters_and_no_two_are_alike():
    _, one = initialize({}, small_specs())
    _, two = initialize({}, small_specs(), seed=1)
    one, two = (jax.tree.map(np.asarray, tree) for tree in (one, two))
    np.testing.assert_array_equal(one["scale"], np.ones(8))
    random = ("embedding", "up", "stack")
    assert all((one[name] != two[name]).all() for name in random)
    assert (one["up"] != one["stack"][0]).all()
    assert (one["stack"][0] != one["stack"][1]).all()


def test_a_new_parameter_changes_no_other():
    _, before = initialize({}, small_specs())
    _, after = initialize({}, small_specs(head=True))
    assert after.pop("head").shape == (V, 8)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_the_scale_is_one_over_root_fan_in_and_less_on_residual_outputs():
    specs = transformer.param_specs(CFG)
    layer = specs["pattern"][0]
    expected = {
        "up": (layer["ffn"]["up"], 8**-0.5),
        "down": (layer["ffn"]["down"], 12**-0.5 / 2),  # 1/sqrt(2 layers) = 1/2
        "out": (layer["attention"]["out"], 16**-0.5 / 2),
        "query": (layer["attention"]["query"], 8**-0.5),
        "embedding": (specs["embedding"], 8**-0.5),
    }
    shape, dtype = (10_000,), jnp.dtype("float32")
    for name, (spec, std) in expected.items():
        drawn = spec.init(jax.random.key(0), shape, dtype)
        # Four standard errors of a standard deviation.
        assert abs(float(drawn.std()) / std - 1) < 4 / np.sqrt(2 * drawn.size), name


def test_the_vocabulary_alone_is_padded_to_the_axes_over_it():
    specs = transformer.param_specs(CFG)
    layout = on_mesh({"fsdp": 2, "tensor": 4})
    shapes = {
        path: (spec.shape, params_lib.physical_shape(spec, layout))
        for path, spec in params_lib.named(specs)
    }
    assert shapes.pop("embedding") == ((257, 8), (260, 8))
    assert all(logical == physical for logical, physical in shapes.values())


def test_a_parameter_that_does_not_divide_is_named():
    cfg = dataclasses.replace(CFG, num_heads=3, num_kv_heads=3, head_dim=2)
    layout = on_mesh({"tensor": 2})
    message = (
        r"pattern/0/attention/key: dim 2 \(heads\) of size 3 .*model.num_kv_heads or"
    )
    with pytest.raises(ValueError, match=message):
        params_lib.shardings(transformer.param_specs(cfg), layout, layout.params)


def test_abstract_is_what_initialize_makes():
    specs = small_specs()
    layout, params = initialize({"fsdp": 2, "tensor": 4}, specs)
    abstract = params_lib.abstract(specs, layout, layout.params, jnp.dtype("float32"))
    described = [
        jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
        for tree in (abstract, params)
    ]
    assert described[0] == described[1]


def random_params(specs, layout):
    """Parameters of any mesh's layout from one stream of numpy."""
    rng = np.random.default_rng(0)

    def draw(spec):
        array = 0.3 * rng.normal(size=spec.shape).astype(np.float32)
        target = params_lib.physical_shape(spec, layout)
        return np.pad(
            array, [(0, t - n) for n, t in zip(spec.shape, target, strict=True)]
        )

    places = params_lib.shardings(specs, layout, layout.params)
    return jax.device_put(jax.tree.map(draw, specs), places)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.slow
def test_padding_the_vocabulary_changes_neither_loss_nor_gradient(tied):
    cfg = dataclasses.replace(CFG, tied=tied)
    tokens_BT1 = np.random.default_rng(0).integers(0, V, (2, 10)).astype(np.uint16)
    tokens_BT1[:, 1] = V - 1  # the last id stands beside the padding

    def loss_and_grads(sizes):
        layout = on_mesh(sizes)
        rules, policy = layout.params, precision.policy("float32")
        ops = seam.Ops(seam.make_einsum(policy, rules), attention.make_attend(rules))
        model = transformer.make_model(cfg, ops=ops, policy=policy, rules=rules)
        loss_config = loss.LossConfig(vocab_size=V, policy=policy, rules=rules)
        loss_fn = objective.next_token_loss(model, loss_config)

        def run(params, batch):
            rows = objective.numbered(batch, rules)
            return jax.value_and_grad(loss_fn, has_aux=True)(params, (), rows, None)

        with jax.set_mesh(layout.mesh):
            params = random_params(model.specs, layout)
            batch = jax.device_put(
                (tokens_BT1, np.ones_like(tokens_BT1, np.uint8)),
                sharding.spec(rules, "batch", None),
            )
            quick = {"xla_backend_optimization_level": 0}
            (loss_sum, _), grads = jax.jit(run, compiler_options=quick)(params, batch)
        return float(loss_sum), jax.tree.map(np.asarray, grads)

    one, one_grads = loss_and_grads({})
    four, four_grads = loss_and_grads({"tensor": 4})
    np.testing.assert_allclose(four, one, rtol=REDUCTION_ORDER)
    for name in ("embedding",) if tied else ("embedding", "head"):
        assert not four_grads[name][V:].any()
        four_grads[name] = four_grads[name][:V]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=REDUCTION_ORDER),
        four_grads,
        one_grads,
    )


def test_the_table_of_a_small_model_is_this():
    cfg = ModelConfig(
        vocab_size=10, width=8, ffn_width=12, num_heads=4, num_kv_heads=2, repeats=3
    )
    assert dry_run.table(transformer.param_specs(cfg)) == TABLE


def test_count_leaves_out_what_multiplies_no_activation():
    specs = transformer.param_specs(CFG)
    matrices = 2 * (8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 12)
    norms = 2 * 2 * 8 + 8
    assert params_lib.count(specs, embeddings=False) == matrices + norms
    assert params_lib.count(specs) == matrices + norms + V * 8
    untied = transformer.param_specs(dataclasses.replace(CFG, tied=False))
    assert params_lib.count(untied, embeddings=False) == matrices + norms + V * 8


def test_stacking_moves_every_dim_by_one():
    spec = transformer.param_specs(CFG)["pattern"][0]["attention"]["out"]
    assert spec.shape == (2, 4, 2, 2, 8)
    assert spec.axes == ("layers", "heads", None, None, "embed")
    assert spec.contract == (1, 2, 3)


TABLE = """\
parameter                       shape              axes                        kind       size
embedding                       10 x 8             vocab, embed                embedding  80
final_norm/scale                8                  -                           vector     8
pattern/0/attention/key         3 x 8 x 2 x 2      layers, embed, heads, -     matrix     96
pattern/0/attention/out         3 x 2 x 2 x 2 x 8  layers, heads, -, -, embed  matrix     192
pattern/0/attention/query       3 x 8 x 2 x 2 x 2  layers, embed, heads, -, -  matrix     192
pattern/0/attention/value       3 x 8 x 2 x 2      layers, embed, heads, -     matrix     96
pattern/0/attention_norm/scale  3 x 8              layers, -                   vector     24
pattern/0/ffn/down              3 x 12 x 8         layers, ffn, embed          matrix     288
pattern/0/ffn/gate              3 x 8 x 12         layers, embed, ffn          matrix     288
pattern/0/ffn/up                3 x 8 x 12         layers, embed, ffn          matrix     288
pattern/0/ffn_norm/scale        3 x 8              layers, -                   vector     24
total                                                                                     1,576"""  # noqa: E501
