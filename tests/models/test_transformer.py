"""The transformer against numpy, and what must not change its numbers."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import naive_transformer

from jaxinfra import mesh as mesh_lib
from jaxinfra import params as params_lib
from jaxinfra import precision, sharding
from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.models import transformer
from jaxinfra.ops import attention, loss, seam
from jaxinfra.train import objective

FLOAT32_ROUNDING = 2e-5  # logits of size 3 after 4 layers
SAME_SUMS = 1e-6  # the same sums, fused in another way
# Optimising these programs takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0}
B, T, V = 4, 11, 19

LLAMA = ModelConfig(
    vocab_size=V,
    width=16,
    ffn_width=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    prefix=(LayerConfig(window=3),),
    pattern=(LayerConfig(rope_theta=50.0), LayerConfig(window=5)),
    repeats=2,
    suffix=(LayerConfig(),),
    rope_theta=100.0,
    qk_norm="head",
    tied=False,
    attention_softcap=2.0,
)
GPT2 = ModelConfig(
    vocab_size=V,
    width=16,
    ffn_width=24,
    num_heads=4,
    num_kv_heads=4,
    repeats=2,
    norm="layernorm",
    norm_eps=1e-5,
    positions="learned",
    max_length=T,
    activation="gelu_tanh",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
SMALL = ModelConfig(
    vocab_size=V, width=8, ffn_width=12, num_heads=2, num_kv_heads=1, repeats=2
)

tokens_BT1 = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.uint16)
# Documents of 5 and 4 tokens, then padding; one document; three; a short one.
segments_BT1 = np.array(
    [
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0],
        [1] * 12,
        [1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.uint8,
)
positions_BT = np.array(
    [
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1],
        range(11),
        [0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7],
    ],
    np.int32,
)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(mesh_lib.make_mesh({}, devices=jax.devices()[:1])):
        yield


@pytest.fixture(params=["one device", "fsdp 2 x tensor 2"])
def each_mesh(request):
    sizes = {} if request.param == "one device" else {"fsdp": 2, "tensor": 2}
    devices = jax.devices()[: 4 if sizes else 1]
    with jax.set_mesh(mesh_lib.make_mesh(sizes, devices=devices)):
        yield


def make(cfg, *, kernel=None, **settings):
    """(model, rules) in float32 on the mesh that is set."""
    rules = sharding.make_layout(jax.sharding.get_mesh()).params
    policy = precision.policy("float32")
    attend = attention.make_attend(rules, kernel=kernel)
    ops = seam.Ops(seam.make_einsum(policy, rules), attend)
    model = transformer.make_model(cfg, ops=ops, policy=policy, rules=rules, **settings)
    return model, rules


def random_params(cfg):
    """numpy parameters, none of them 0 or 1, so that each one shows in the result."""
    rng = np.random.default_rng(1)

    def draw(spec):
        noise = 0.4 * rng.normal(size=spec.shape)
        return np.float32(noise + (1 if spec.kind == "vector" else 0))

    return jax.tree.map(draw, transformer.param_specs(cfg))


def place(params, cfg):
    layout = sharding.make_layout(jax.sharding.get_mesh())
    specs = transformer.param_specs(cfg)

    def pad(array, spec):
        target = params_lib.physical_shape(spec, layout)
        sizes = zip(array.shape, target, strict=True)
        return np.pad(array, [(0, big - small) for small, big in sizes])

    padded = jax.tree.map(pad, params, specs)
    return jax.device_put(padded, params_lib.shardings(specs, layout, layout.params))


@functools.cache
def logits_program(mesh, cfg, settings):
    del mesh  # the one that is set: a part of the cache's key
    model, rules = make(cfg, **dict(settings))

    def run(params, batch, key):
        rows = objective.numbered(batch, rules)
        t = objective.make_targets(rows.tokens_BT1, rows.segments_BT1, rules)
        context = seam.Context(t.positions_BT, t.segments_BT, rows.rows_B, key)
        h_BTD, head_VD, _ = model.forward(params, t.tokens_BT, context)
        return h_BTD, head_VD

    return jax.jit(run, compiler_options=QUICK)


@functools.cache
def grads_program(mesh, cfg, settings):
    del mesh
    model, rules = make(cfg, **dict(settings))
    policy = precision.policy("float32")
    loss_config = loss.LossConfig(vocab_size=V, policy=policy, rules=rules)
    loss_fn = objective.next_token_loss(model, loss_config)

    def run(params, batch):
        rows = objective.numbered(batch, rules)
        return jax.value_and_grad(loss_fn, has_aux=True)(params, (), rows, None)

    return jax.jit(run, compiler_options=QUICK)


def place_batch(*arrays):
    return [
        jax.device_put(x, sharding.spec(sharding.Rules(), "batch", None))
        for x in arrays
    ]


def logits_of(
    cfg, params, tokens_BT1=tokens_BT1, segments_BT1=segments_BT1, key=None, **settings
):
    """float32 logits of the documents in rows, numpy."""
    program = logits_program(jax.sharding.get_mesh(), cfg, tuple(settings.items()))
    batch = place_batch(tokens_BT1, segments_BT1)
    h_BTD, head_VD = map(np.asarray, program(place(params, cfg), batch, key))
    return h_BTD @ head_VD[:V].T


def grads_of(cfg, params, tokens_BT1=tokens_BT1, segments_BT1=segments_BT1, **settings):
    """(loss sum, gradients), numpy."""
    program = grads_program(jax.sharding.get_mesh(), cfg, tuple(settings.items()))
    batch = place_batch(tokens_BT1, segments_BT1)
    (loss_sum, _), grads = program(place(params, cfg), batch)
    return jax.tree.map(np.asarray, (loss_sum, grads))


def assert_close(tree, expected, *, atol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol), tree, expected
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_are_those_of_the_published_model(name, each_mesh):
    cfg = {"llama": LLAMA, "gpt2": GPT2}[name]
    reference = getattr(naive_transformer, name)
    params = random_params(cfg)
    expected = reference(
        jax.tree.map(np.float64, params),
        tokens_BT1[:, :-1],
        segments_BT1[:, :-1],
        positions_BT,
        cfg,
    )
    np.testing.assert_allclose(
        logits_of(cfg, params) / np.abs(expected).max(),
        expected / np.abs(expected).max(),
        atol=FLOAT32_ROUNDING,
    )


def test_positions_restart_and_targets_stay_within_a_document():
    targets = objective.make_targets(
        jnp.asarray(tokens_BT1), jnp.asarray(segments_BT1), sharding.Rules()
    )
    np.testing.assert_array_equal(targets.positions_BT, positions_BT)
    np.testing.assert_array_equal(targets.targets_BT, tokens_BT1[:, 1:])
    expected = [
        [1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0],
        [1] * 11,
        [1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(targets.weights_BT, expected)


@pytest.mark.parametrize("cfg", [LLAMA, GPT2], ids=["rotary", "learned"])
def test_a_document_is_the_same_whatever_stands_before_it_in_the_row(cfg):
    params = random_params(cfg)
    together = logits_of(cfg, params)[0, 5:9]
    other_tokens = tokens_BT1.copy()
    other_tokens[0, :5] = (other_tokens[0, :5] + 7) % V
    np.testing.assert_array_equal(
        logits_of(cfg, params, other_tokens)[0, 5:9], together
    )
    # Alone at the start of a row: positions restart with each document.
    alone, segments = tokens_BT1.copy(), segments_BT1.copy()
    alone[0, :4], segments[0] = tokens_BT1[0, 5:9], [1] * 4 + [0] * 8
    np.testing.assert_allclose(
        logits_of(cfg, params, alone, segments)[0, :4],
        together,
        atol=FLOAT32_ROUNDING,
    )


def test_padding_does_not_change_the_gradient():
    params = random_params(SMALL)
    filled = np.where(segments_BT1 == 0, (tokens_BT1 + 3) % V, tokens_BT1)
    expected = grads_of(SMALL, params, remat="none")
    assert_close(grads_of(SMALL, params, filled, remat="none"), expected, atol=0)
    # Two more columns of it: other shapes, so other sums.
    wider = [np.pad(x, ((0, 0), (0, 2))) for x in (tokens_BT1, segments_BT1)]
    wide = grads_of(SMALL, params, *wider, remat="none")
    assert_close(wide, expected, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.slow
def test_unrolled_layers_give_the_gradients_of_the_loop(remat):
    params = random_params(SMALL)
    looped = grads_of(SMALL, params, remat=remat)
    unrolled = grads_of(SMALL, params, remat=remat, unroll=True)
    assert_close(unrolled, looped, atol=10 * SAME_SUMS)


@pytest.mark.parametrize(
    "remat",
    [
        "full",
        "dots",
        "save:query+attention_out+ffn_in",
        "save:query,offload:layer_input+ffn_in",
    ],
)
@pytest.mark.slow
def test_rematerialisation_does_not_change_the_gradients(remat):
    params = random_params(SMALL)
    plain = grads_of(SMALL, params, remat="none")
    assert_close(grads_of(SMALL, params, remat=remat), plain, atol=10 * SAME_SUMS)


def test_each_rematerialisation_makes_again_what_it_does_not_keep():
    """By the matmuls of the loss and its gradients, in which layers are a loop."""
    params, batch = random_params(SMALL), place_batch(tokens_BT1, segments_BT1)

    def matmuls(remat):
        program = grads_program(jax.sharding.get_mesh(), SMALL, (("remat", remat),))
        return program.lower(place(params, SMALL), batch).as_text().count("dot_general")

    none, dots, some, full = map(matmuls, ("none", "dots", "save:ffn_in", "full"))
    assert none == dots < some < full


def all_eqns(jaxpr):
    """Its equations, and those of the functions that they call."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=callable):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_eqns(inner)


@pytest.mark.parametrize("unroll", [False, True])
def test_what_is_offloaded_goes_to_the_host_and_comes_back(unroll):
    params, batch = random_params(SMALL), place_batch(tokens_BT1, segments_BT1)

    def moves(remat):
        settings = (("remat", remat), ("unroll", unroll))
        program = grads_program(jax.sharding.get_mesh(), SMALL, settings)
        run = program.__wrapped__
        eqns = list(all_eqns(jax.make_jaxpr(run)(place(params, SMALL), batch).jaxpr))
        space = lambda eqn: eqn.params.get("devices", (None,))[0]
        count = lambda where: sum(space(eqn) is where for eqn in eqns)
        matmuls = sum(eqn.primitive.name == "dot_general" for eqn in eqns)
        return count(jax.memory.Space.Host), count(jax.memory.Space.Device), matmuls

    away, back, matmuls = moves("offload:layer_input")
    layers = SMALL.num_layers if unroll else 1
    assert moves("full")[:2] == (0, 0)
    assert (away, back) == (layers, layers)
    away, back, fewer = moves("offload:layer_input+ffn_in")  # into a gated MLP go two
    assert (away, back) == (3 * layers, 3 * layers)
    assert fewer < matmuls  # what comes back is not made again


def test_an_unknown_rematerialisation_is_refused():
    with pytest.raises(ValueError, match="must be none, full, dots, save:NAME"):
        make(SMALL, remat="ful")


def test_remat_saves_only_what_is_named():
    def saved(remat):
        model, rules = make(SMALL, remat=remat, unroll=True)
        tokens = jnp.asarray(tokens_BT1[:, :-1])
        here = sharding.spec(rules, "batch", "length")
        tokens = jax.device_put(tokens, here)
        context = seam.Context(jax.device_put(positions_BT, here))

        def pull_back(params):
            def total(params):
                return jnp.sum(model.forward(params, tokens, context)[0])

            return jax.vjp(total, params)[1]

        params = place(random_params(SMALL), SMALL)
        kept = jax.tree.leaves(jax.eval_shape(pull_back, params))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

    none, dots, one, full = map(saved, ("none", "dots", "save:query", "full"))
    assert full < one < dots < none


def test_prefix_and_suffix_are_layers_like_the_pattern():
    layers = LLAMA.layers
    flat = dataclasses.replace(LLAMA, prefix=(), pattern=layers, repeats=1, suffix=())
    params = random_params(LLAMA)
    in_order = list(naive_transformer.in_order(params, LLAMA))
    rearranged = params | {
        "prefix": [],
        "pattern": [jax.tree.map(lambda x: x[None], layer) for layer in in_order],
        "suffix": [],
    }
    np.testing.assert_allclose(
        logits_of(flat, rearranged), logits_of(LLAMA, params), atol=FLOAT32_ROUNDING
    )


@pytest.mark.parametrize("unroll", [False, True])
def test_a_model_of_prefix_layers_alone_runs(unroll):
    cfg = dataclasses.replace(SMALL, prefix=(LayerConfig(),) * 2, repeats=0)
    expected = dataclasses.replace(SMALL, pattern=(LayerConfig(),) * 2, repeats=1)
    params = random_params(cfg)
    moved = params | {
        "prefix": [],
        "pattern": [jax.tree.map(lambda x: x[None], p) for p in params["prefix"]],
    }
    np.testing.assert_allclose(
        logits_of(cfg, params, unroll=unroll),
        logits_of(expected, moved),
        atol=FLOAT32_ROUNDING,
    )


@pytest.mark.slow
def test_dropout_is_the_same_on_four_devices_and_unrolled():
    cfg = dataclasses.replace(SMALL, num_kv_heads=2, dropout=0.3)
    params = random_params(cfg)
    one = logits_of(cfg, params, key=jax.random.key(0), unroll=True)
    mesh = mesh_lib.make_mesh({"fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        four = logits_of(cfg, params, key=jax.random.key(0))
        other = logits_of(cfg, params, key=jax.random.key(1))
    np.testing.assert_allclose(four, one, atol=FLOAT32_ROUNDING)
    assert np.abs(four - other).max() > 0.1


def test_a_fused_kernel_fits_the_models_sharding_types(caplog):
    mesh = mesh_lib.make_mesh({"fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    cfg = dataclasses.replace(LLAMA, head_dim=8)
    with jax.set_mesh(mesh), caplog.at_level(logging.WARNING, logger="jaxinfra"):
        model, rules = make(cfg, kernel="splash")
        here = jax.NamedSharding(mesh, sharding.spec(rules, "batch", "length"))
        ints_BT = jax.ShapeDtypeStruct((B, 128), jnp.int32, sharding=here)
        layout = sharding.make_layout(mesh)
        params = params_lib.abstract(model.specs, layout, rules, jnp.float32)

        def run(params, tokens_BT, positions_BT, segments_BT):
            context = seam.Context(positions_BT, segments_BT)
            return model.forward(params, tokens_BT, context)[0]

        h_BTD = jax.eval_shape(run, params, ints_BT, ints_BT, ints_BT)
    assert h_BTD.shape == (B, 128, cfg.width)
    assert not caplog.records  # no fallback
