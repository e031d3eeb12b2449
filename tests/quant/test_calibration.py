"""A whole model in few bits, calibrated layer by layer on simulated devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant import naive_rounding as naive
from tune import small

from jaxinfra import params
from jaxinfra.config import ConfigError, LayerConfig
from jaxinfra.generate import score
from jaxinfra.models import transformer
from jaxinfra.models.specs import param_specs
from jaxinfra.ops import attention, layers, seam
from jaxinfra.parallel import expert
from jaxinfra.quant import arrays, calibration, compression, rescaled
from jaxinfra.quant.compression import Compression

# Few bits multiplied out or not: float32 sums in another order, of logits near 3.
SAME_FUNCTION = 2e-5
# The calibration's sums differ in the last bits between meshes, and a weight between
# two codes may go to either: the logits, 0.3 off, may differ by a tenth of that.
OTHER_MESH = 0.03
# Of a matrix's outputs, squared: 8 bits leave 1e-5, 4 bits 3e-3.
INT8_OUTPUTS = 1e-4
INT8_LOGITS = 0.02
# Of an output error in 4 bits, by float32 and by numpy's float64: a weight between two
# codes takes another, and GPTQ makes that good by others.
OTHER_CODES = 0.02
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def compressed(how_of, sizes, cfg=small.MODEL):
    """(logits of the model, of it in few bits, of these multiplied out)."""
    rng = np.random.default_rng(0)
    batches = list(rng.integers(0, cfg.vocab_size, (2, 8, 16)))
    asked_BT = rng.integers(0, cfg.vocab_size, (8, 16))
    with small.mesh_of(sizes) as layout:
        model = model_of(cfg, layout)
        how = how_of(model.specs)
        weights = small.weights(layout, cfg)
        few, errors = calibration.compress(
            model, cfg, weights, batches, how, layout=layout
        )
        wanted = compression.abstract(model.specs, how, layout, jnp.dtype("float32"))
        for (path, leaf), like in zip(
            params.named(few), jax.tree.leaves(wanted), strict=True
        ):
            assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype), path
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), path
        logits = score.make_logits(cfg, policy=small.POLICY, layout=layout)
        plain = rescaled.plain(few, jnp.dtype("float32"))
        return [logits(tree, asked_BT) for tree in (weights, few, plain)], errors


def model_of(cfg, layout):
    rules = dataclasses.replace(layout.params, length=(), residual=())
    ops = seam.Ops(
        seam.make_einsum(small.POLICY, rules),
        attention.make_attend(rules),
        expert.make_dispatch(cfg, policy=small.POLICY, rules=rules),
    )
    return transformer.make_model(cfg, ops=ops, policy=small.POLICY, rules=rules)


def of(form, method, group):
    """All matrices so."""

    def how(specs):
        paths = [path for path, s in params.named(specs) if s.kind == "matrix"]
        return Compression(
            format=form, method=method, group=group, matrices=tuple(paths)
        )

    return how


def off(logits):
    return float(np.sqrt(np.mean((logits[1] - logits[0]) ** 2)))


@pytest.mark.parametrize(
    ("form", "method", "group"),
    [
        ("int4", "gptq", 4),
        ("int4", "awq", 0),
        ("nf4", "awq", 4),
        ("int8", "gptq", 0),
    ],
)
@pytest.mark.slow
def test_every_mesh_makes_the_same_model_which_runs_as_it_is_kept(form, method, group):
    alone, errors = compressed(of(form, method, group), {})
    many, _ = compressed(of(form, method, group), MESH)
    near, none = compressed(of(form, "nearest", group), {})
    assert not none
    assert len(errors) == 2 * 7, "seven matrices in each of two layers"
    assert all(0 < error < 0.1 for error in errors.values())
    for logits in (alone, many, near):
        np.testing.assert_allclose(logits[1], logits[2], atol=SAME_FUNCTION)
    assert abs(off(alone) - off(many)) < OTHER_MESH
    assert off(alone) > 0
    if form != "int8":  # there other inputs than the calibration's decide
        assert off(alone) < off(near)


@pytest.mark.slow
def test_devices_that_share_groups_run_the_same_model():
    """Of 24 inputs in groups of 8 each device has 12."""
    cfg = dataclasses.replace(small.MODEL, width=24, head_dim=8)
    alone, _ = compressed(of("nf4", "nearest", 8), {}, cfg)
    many, _ = compressed(of("nf4", "nearest", 8), MESH, cfg)
    for logits in many[1:]:
        np.testing.assert_allclose(logits, alone[1], atol=SAME_FUNCTION)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_and_layers_of_all_kinds_are_compressed(method):
    cfg = dataclasses.replace(
        small.MODEL,
        prefix=(LayerConfig(),),
        pattern=(LayerConfig(feed_forward="experts"), LayerConfig(window=4)),
        suffix=(LayerConfig(feed_forward="experts"),),
        num_experts=3,
        # All of them: of two that are nearly as likely any rounding may take the other,
        # and that token's logits jump by 0.3 to 0.7.
        experts_per_token=3,
        expert_ffn_width=8,
    )
    logits, errors = compressed(of("int8", method, 4), {}, cfg)
    assert len(errors) == 3 * 7 + 3 * 8, "an expert layer has a router"
    assert all(0 < error < INT8_OUTPUTS for error in errors.values())
    np.testing.assert_allclose(logits[1], logits[2], atol=SAME_FUNCTION)
    assert 0 < off(logits) < INT8_LOGITS


class Watched:
    """A weight, `seam.Wrapped`, that keeps what it is multiplied with."""

    def __init__(self, weight, sink, name):
        self.weight, self.sink, self.name = weight, sink, name

    def contract(self, einsum, equation, x, *, out):
        self.sink[self.name] = x
        return einsum(equation, x, self.weight, out=out)


def inputs_of_experts(model, cfg, weights, ids_BT):
    """What up and gate ([B, T, D]) and down ([B, T, E, F]) of the first layer meet."""
    sink, rows = {}, jax.P(("data", "fsdp", "expert"))
    ids_BT = jax.reshard(jnp.asarray(ids_BT), rows)
    layer = weights["prefix"][0]
    ffn = {
        name: Watched(leaf, sink, name) if name in ("up", "gate", "down") else leaf
        for name, leaf in layer["ffn"].items()
    }
    positions_BT = jnp.zeros_like(ids_BT) + jnp.arange(ids_BT.shape[1])
    rotations = layers.rotations_of(cfg, positions_BT)
    context = seam.Context(positions_BT, rotations=rotations)
    x = model.embed(weights, ids_BT, context)
    model.block(layer | {"ffn": ffn}, x, context, cfg.prefix[0], jnp.int32(0), None)
    return {name: np.asarray(x, np.float64) for name, x in sink.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_expert_is_rounded_as_numpy_rounds_it_on_what_it_met(method):
    cfg = dataclasses.replace(
        small.MODEL,
        prefix=(LayerConfig(feed_forward="experts"),),
        repeats=1,
        num_experts=3,
        experts_per_token=2,
        expert_ffn_width=8,
    )
    ids_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (8, 16))
    paths = tuple(f"prefix/0/ffn/{name}" for name in ("up", "gate", "down"))
    how = Compression(format="int4", method=method, group=4, matrices=paths)
    with small.mesh_of({}) as layout:
        model = model_of(cfg, layout)
        weights = small.weights(layout, cfg)
        few, errors = calibration.compress(
            model, cfg, weights, [ids_BT], how, layout=layout
        )
        met = inputs_of_experts(model, cfg, weights, ids_BT)
        plain = rescaled.plain(few, jnp.dtype("float32"))
    whole, made = (small.host(tree["prefix"][0]["ffn"]) for tree in (weights, plain))
    for name, x in met.items():
        found_E = []
        for e, (w_NO, near_NO) in enumerate(zip(whole[name], made[name], strict=True)):
            own = x[..., e, :] if name == "down" else x
            x_SN, w_NO = own.reshape(-1, own.shape[-1]), w_NO.astype(np.float64)
            sums = [x_SN.T @ x_SN, np.abs(x_SN).sum(0)]
            if method == "gptq":
                wanted_NO = naive.gptq(w_NO, sums[0], "int4", 4)
            else:
                wanted_NO, _ = naive.awq(w_NO, *sums, "int4", 4)
            plain_NO = naive.nearest(w_NO, "int4", 4)
            found, wanted, worse = (
                naive.output_error(w_NO, rounded_NO, sums[0])
                for rounded_NO in (near_NO, wanted_NO, plain_NO)
            )
            assert found == pytest.approx(wanted, rel=OTHER_CODES), (name, e)
            assert found < worse
            found_E.append(found)
        told = errors[f"0/ffn/{name}"]
        assert told == pytest.approx(np.mean(found_E), rel=1e-3)


def test_only_the_matrices_that_are_named_change():
    specs = param_specs(small.MODEL)
    with small.mesh_of({}) as layout:
        how = Compression(
            format="int8", method="nearest", group=0, matrices=("pattern/0/ffn/up",)
        )
        model = type("Model", (), {"specs": specs})
        weights = small.weights(layout)
        few, _ = calibration.compress(
            model, small.MODEL, weights, [], how, layout=layout
        )
    changed = [
        path
        for (path, spec), leaf in zip(
            params.named(specs),
            jax.tree.leaves(few, is_leaf=rescaled.in_few_bits),
            strict=True,
        )
        if rescaled.in_few_bits(leaf)
    ]
    assert changed == ["pattern/0/ffn/up"]


def test_groups_that_do_not_divide_are_told_with_the_path_and_a_mesh_limits_none():
    specs = param_specs(small.MODEL)
    abstract = lambda group, layout: compression.abstract(
        specs, of("int4", "gptq", group)(specs), layout, jnp.dtype("float32")
    )
    with small.mesh_of({}) as layout:
        told = r"attention/.*groups of 5: .*divide into blocks of 5; choose a divisor"
        with pytest.raises(ConfigError, match=told):
            abstract(5, layout)
    with small.mesh_of({"tensor": 2}) as layout:
        down = abstract(8, layout)["pattern"][0]["ffn"]["down"]
        assert down.values.sharding.spec[1] == "tensor"  # 12 of 24 on each device
        assert down.scales.sharding.spec[1] is None


def test_a_record_comes_back_from_json_and_a_strange_one_is_refused():
    how = of("nf4", "awq", 64)(param_specs(small.MODEL))
    assert compression.from_json(how.to_json()) == how
    for key, value in {"format": "int3", "group": -1, "more": 1, "matrices": 3}.items():
        with pytest.raises(ConfigError, match="does not know"):
            compression.from_json(how.to_json() | {key: value})


def test_experts_in_few_bits_say_that_all_tokens_meet_them(caplog):
    attention.say_once.cache_clear()
    layer = LayerConfig(feed_forward="experts")
    cfg = dataclasses.replace(
        small.MODEL, pattern=(layer,), repeats=1, num_experts=4, experts_per_token=2
    )
    with small.mesh_of({}) as layout:
        weights = small.weights(layout, cfg)
        logits = score.make_logits(cfg, policy=small.POLICY, layout=layout)
        ids_BT = np.zeros((2, 4), np.int32)
        logits(weights, ids_BT)
        assert not caplog.records
        leaves = [
            arrays.quantize(w, "int8", dims=(w.ndim - 2,)) if "/down" in path else w
            for path, w in params.named(weights)
        ]
        logits(params.unflatten(weights, leaves), ids_BT)
    assert "every token, as with parallel.experts='dense'" in caplog.text
