"""Traffic in 8 bits: near the plain einsum, and fewer bytes in the compiled program."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import pipelines

import jaxinfra
from jaxinfra import experiment, params, precision, sharding, tasks
from jaxinfra.config import (
    CommConfig,
    Config,
    ConfigError,
    LayerConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from jaxinfra.models.specs import param_specs
from jaxinfra.ops import seam
from jaxinfra.parallel import expert
from jaxinfra.params import ParamSpec
from jaxinfra.plan import targets
from jaxinfra.quant import communication
from jaxinfra.train.objective import Aux
from jaxinfra.tune import lora

RULES = sharding.Rules()
POLICY = precision.policy("float32")
B, T, D, F = 8, 16, 256, 512
ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "scripts" / "results" / "quant_programs.json"
# Half a step of the block's largest value, about 3 standard deviations.
ROUNDED = {"int8": 0.02, "fp8": 0.06}
MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
CASES = {
    "up": ("BTD,DF->BTF", (B, T, D), (D, F), ("batch", "length", "ffn")),
    "down": ("BTF,FD->BTD", (B, T, F), (F, D), ("batch", "length", "width")),
}
PLACES = {
    "up": (("batch", "length", "width"), ("embed", "ffn")),
    "down": (("batch", "length", "ffn"), ("ffn", "embed")),
}


def operands(case, mesh, policy=POLICY):
    equation, x_shape, w_shape, out = CASES[case]
    keys = jax.random.split(jax.random.key(0), 3)
    put = lambda x, names: jax.device_put(
        x, jax.NamedSharding(mesh, sharding.spec(RULES, *names))
    )
    x = put(jax.random.normal(keys[0], x_shape, policy.compute), PLACES[case][0])
    w = put(jax.random.normal(keys[1], w_shape), PLACES[case][1])
    sizes = dict(zip(equation[:3] + equation[4:6], x_shape + w_shape))
    g_shape = tuple(sizes[d] for d in equation.split("->")[1])
    return x, w, put(jax.random.normal(keys[2], g_shape, policy.compute), out)


def outcomes(einsum, case):
    equation, *_, out = CASES[case]

    def run(x, w, g):
        loss = lambda x, w: jnp.sum(einsum(equation, x, w, out=out) * g)
        return einsum(equation, x, w, out=out), *jax.grad(loss, (0, 1))(x, w)

    return jax.jit(run)


def relative(a, b):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", MESHES)
def test_only_what_travels_is_rounded(sizes, case, form):
    mesh = jaxinfra.make_mesh(sizes)
    with jax.set_mesh(mesh):
        given = operands(case, mesh)
        plain = outcomes(seam.make_einsum(POLICY, RULES), case)(*given)
        low = communication.low_bit_traffic(POLICY, RULES, gather=form, reduce=form)
        found = outcomes(low, case)(*given)
    for name, a, b in zip(("y", "dx", "dw"), found, plain, strict=True):
        assert a.sharding == b.sharding, name
        assert 0 < relative(a, b) < ROUNDED[form], name


def test_adapters_are_contracted_as_the_matrix_that_they_make():
    mesh, w_shape = jaxinfra.make_mesh({"fsdp": 8}), CASES["up"][2]
    spec = ParamSpec(w_shape, PLACES["up"][1], (0,), "matrix", params.constant(0.0))
    with jax.set_mesh(mesh):
        x, w, _ = operands("up", mesh)
        pair = {
            name: jax.device_put(
                jax.random.normal(jax.random.key(5), s.shape),
                jax.NamedSharding(mesh, sharding.spec(RULES, *s.axes)),
            )
            for name, s in lora.pair_specs(spec, 4).items()
        }
        weight = lora.join(w, pair, spec, LoraConfig(rank=4, alpha=4.0))
        low = communication.low_bit_traffic(POLICY, RULES, gather="int8", reduce="int8")
        multiply = functools.partial(low, CASES["up"][0], out=CASES["up"][-1])
        found = jax.jit(multiply)(x, weight)
    whole = np.asarray(w) + np.asarray(pair["a"]) @ np.asarray(pair["b"])
    assert 0 < relative(found, np.asarray(x) @ whole) < 2 * ROUNDED["int8"]


@pytest.mark.parametrize("sizes", [{"data": 8}, {"tensor": 2, "data": 4}])
def test_without_an_fsdp_axis_nothing_changes(sizes):
    mesh = jaxinfra.make_mesh(sizes)
    with jax.set_mesh(mesh):
        given = operands("up", mesh)
        plain = outcomes(seam.make_einsum(POLICY, RULES), "up")(*given)
        low = communication.low_bit_traffic(POLICY, RULES, gather="int8", reduce="int8")
        jax.tree.map(np.testing.assert_array_equal, outcomes(low, "up")(*given), plain)


def test_each_way_is_a_setting_of_its_own():
    mesh = jaxinfra.make_mesh({"fsdp": 8})
    with jax.set_mesh(mesh):
        given = operands("up", mesh)
        plain = outcomes(seam.make_einsum(POLICY, RULES), "up")(*given)
        make = lambda **ways: outcomes(
            communication.low_bit_traffic(POLICY, RULES, **ways), "up"
        )(*given)
        gathered = make(gather="int8", reduce="compute")
        reduced = make(gather="compute", reduce="int8")
    np.testing.assert_allclose(gathered[2], plain[2], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(reduced[0], plain[0])
    assert relative(gathered[0], plain[0]) > 1e-4
    assert relative(reduced[2], plain[2]) > 1e-4


ITEM = {"bf16": 2, "f32": 4, "s8": 1, "f8e4m3fn": 1, "f16": 2, "u8": 1, "s32": 4}


def traffic(text):
    """Bytes that one device receives by each kind of collective, from the program."""
    total = dict.fromkeys(
        ("all-gather", "all-to-all", "reduce-scatter", "all-reduce"), 0
    )
    line = re.compile(r"= (.*?) (all-gather|all-to-all|reduce-scatter|all-reduce)\(")
    for shapes, kind in line.findall(text):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = int(np.prod([int(n) for n in dims.split(",") if n]))
            total[kind] += size * ITEM[dtype]
    return total


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_the_compiled_program_moves_half_the_bytes(form):
    """Gathers against those of bfloat16, reductions against a reduce-scatter of
    bfloat16; on the CPU a plain program has float32 gathers, so bytes are counted."""
    policy, mesh = precision.policy("bfloat16"), jaxinfra.make_mesh({"fsdp": 8})
    with jax.set_mesh(mesh):
        given = operands("up", mesh, policy)
        low = communication.low_bit_traffic(policy, RULES, gather=form, reduce=form)
        text = outcomes(low, "up").lower(*given).compile().as_text()
    moved = traffic(text)
    # y and dx each gather the weight; a compiler may gather once for both.
    assert 0 < moved["all-gather"] <= 0.55 * 2 * (2 * D * F)
    assert 0 < moved["all-to-all"] <= 0.55 * (2 * D * F)
    assert moved["reduce-scatter"] == moved["all-reduce"] == 0


EXPERTS = ModelConfig(
    vocab_size=61,
    width=32,
    num_heads=2,
    num_kv_heads=2,
    repeats=0,
    suffix=(LayerConfig(feed_forward="experts"),),
    num_experts=8,
    experts_per_token=2,
    expert_ffn_width=48,
)


def layer_of_experts(mesh, policy, **comm):
    """(A jitted layer of dropless experts with its gradients, what it takes)."""
    layout = sharding.make_layout(mesh)
    rules = layout.params
    specs = param_specs(EXPERTS)["suffix"][0]["ffn"]
    made = params.initialize(specs, jax.random.key(3), layout=layout, dtype=jnp.float32)
    x, g = (
        jax.device_put(
            jax.random.normal(jax.random.key(i), (8, 16, 32), policy.compute),
            jax.NamedSharding(mesh, sharding.spec(rules, "batch", "length", "width")),
        )
        for i in range(2)
    )
    dispatch = expert.make_dispatch(
        EXPERTS, policy=policy, rules=rules, comm=CommConfig(**comm)
    )

    def run(made, x, g):
        einsum = seam.make_einsum(policy, rules)
        context = seam.Context(None)
        meet = lambda *given: dispatch(*given, context, 0, einsum=einsum)[0]
        y, pull = jax.vjp(meet, made, x)
        return y, *pull(g)

    return jax.jit(run), (made, x, g)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_experts_that_drop_no_token_cross_so_too(sizes):
    mesh = jaxinfra.make_mesh(sizes)
    with jax.set_mesh(mesh):
        run, given = layer_of_experts(mesh, POLICY)
        plain = run(*given)
        gathered = layer_of_experts(mesh, POLICY, gather="int8")[0](*given)
        reduced = layer_of_experts(mesh, POLICY, reduce="int8")[0](*given)
    for name in ("up", "gate", "down"):
        found, expected = reduced[1][name], plain[1][name]
        assert found.sharding == expected.sharding
        assert 1e-3 < relative(found, expected) < ROUNDED["int8"], name
    # Three matrices are rounded, one after the other.
    for i in (0, 2):
        np.testing.assert_array_equal(reduced[i], plain[i])
        assert 1e-3 < relative(gathered[i], plain[i]) < 2 * ROUNDED["int8"]


def test_the_program_gathers_and_reduces_whole_experts_as_bytes():
    policy, mesh = precision.policy("bfloat16"), jaxinfra.make_mesh({"fsdp": 8})
    kinds = r"all_gather|all_to_all|reduce_scatter"
    line = re.compile(rf'"stablehlo.({kinds})".*?-> tensor<([\dx]+)x(\w+)>', re.S)

    def moved(**comm):
        """(kind, dtype) of every collective of as many values as all experts have."""
        run, given = layer_of_experts(mesh, policy, **comm)
        found = line.findall(run.lower(*given).as_text())
        whole = {8 * 32 * 48}
        sizes = {"all_gather": whole, "all_to_all": whole, "reduce_scatter": {32 * 48}}
        return {
            (kind, dtype)
            for kind, dims, dtype in found
            if np.prod([int(n) for n in dims.split("x")]) in sizes[kind]
        }

    with jax.set_mesh(mesh):
        assert moved() == {("all_gather", "bf16"), ("reduce_scatter", "f32")}
        low = moved(gather="int8", reduce="int8")
        assert low == {("all_gather", "ui8"), ("all_to_all", "ui8")}


@pytest.mark.slow
def test_a_model_of_experts_is_rounded_alike_whichever_way_its_tokens_go():
    """The same blocks of the same shards: against "dense", whose weights meet the
    einsum. Without 8 bits gradients differ more, as some tokens choose otherwise."""
    low = {"comm": CommConfig(gather="int8", reduce="int8")}
    dropless, dense = (
        pipelines.config({"fsdp": 2}, model=pipelines.EXPERTS, experts=way)
        for way in ("dropless", "dense")
    )
    plain, _, weights = pipelines.gradients(dropless)
    found, _, _ = pipelines.gradients(dataclasses.replace(dropless, **low), weights)
    same, _, _ = pipelines.gradients(dataclasses.replace(dense, **low), weights)
    assert 0 < abs(found.loss_sum / plain.loss_sum - 1) < ROUNDED["int8"]
    np.testing.assert_allclose(found.loss_sum, same.loss_sum, rtol=1e-5)
    far = pipelines.distance(found.grads, same.grads)
    assert max(far.values()) < 1e-3, far


@pytest.mark.slow
def test_a_pipeline_gathers_and_reduces_its_layers_so():
    """Once a step each; the embedding and the head go as they are."""
    config = pipelines.config(
        {"pipeline": 2, "fsdp": 2}, zero=3, model={"width": 64, "repeats": 2}
    )
    low = dataclasses.replace(config, comm=CommConfig(gather="int8", reduce="int8"))
    plain, held_out, weights = pipelines.gradients(config)
    found, low_held_out, _ = pipelines.gradients(low, weights)
    assert 0 < abs(found.loss_sum / plain.loss_sum - 1) < ROUNDED["int8"]
    assert low_held_out[0] != held_out[0]
    far = pipelines.distance(found.grads, plain.grads)
    assert 0 < max(far.values()) < 3 * ROUNDED["int8"], far  # on the way there and back


def perceptron(config, layout, policy):
    """A task of plain functions: two matrices and a vector, least squares."""
    spec = lambda shape, axes, kind: ParamSpec(
        shape, axes, (0,), kind, params.normal(0.1)
    )
    specs = {
        "up": spec((D, F), ("embed", "ffn"), "matrix"),
        "down": spec((F, 8), ("embed", None), "matrix"),
        "shift": spec((F,), ("embed",), "vector"),
    }
    rows = sharding.spec(layout.params, "batch", None)

    def loss_fn(weights, model_state, batch, key):
        whole = jax.tree.map(lambda w: jax.reshard(w, jax.P()), weights)
        hidden = jnp.einsum("BD,DF->BF", batch, whole["up"], out_sharding=rows)
        hidden = hidden + whole["shift"]
        out = jnp.einsum("BF,FK->BK", hidden, whole["down"], out_sharding=rows)
        return jnp.sum(out**2), Aux(jnp.float32(B), {}, {})

    return tasks.Task(specs=specs, loss_fn=loss_fn)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_matrices_of_a_users_own_task_are_gathered_so(form):
    def of(comm):
        config = Config(
            name="own",
            task="own",
            train=TrainConfig(batch_size=B),
            mesh=MeshConfig(fsdp=8),
            comm=comm,
        )
        built = experiment.build(config, get_task=perceptron)
        grads = lambda weights, x: jax.value_and_grad(
            lambda w: built.task.loss_fn(w, (), x, None)[0]
        )(weights)
        with jax.set_mesh(built.layout.mesh):
            state = built.init()
            place = experiment.batch_sharding(built.layout)
            x = jax.device_put(jax.random.normal(jax.random.key(1), (B, D)), place)
            program = jax.jit(grads).lower(state.params, x).compile()
            return program(state.params, x), program.as_text()

    (loss, grads), _ = of(CommConfig())
    (low_loss, low_grads), text = of(CommConfig(gather=form))
    assert 0 < abs(low_loss / loss - 1) < ROUNDED[form]
    for name, grad in grads.items():
        assert grad.sharding == low_grads[name].sharding
        assert 0 < relative(low_grads[name], grad) < 2 * ROUNDED[form], name
    # Codes, their scales, and the vector as it is.
    matrices = D * F + F * 8
    assert matrices < traffic(text)["all-gather"] < 1.6 * matrices


def test_an_own_task_that_makes_its_gradients_cannot_have_them_gathered_so():
    config = Config(
        name="own", task="own", mesh=MeshConfig(fsdp=8), comm=CommConfig(gather="int8")
    )
    task = perceptron(
        config, sharding.make_layout(jaxinfra.make_mesh({"fsdp": 8})), POLICY
    )
    with pytest.raises(ConfigError, match="makes its gradients itself"):
        communication.gathered_in_few_bits(
            task._replace(grad_fn=lambda *_: None), config.comm
        )


def test_the_price_that_is_told_is_that_of_the_results():
    results = json.loads(RESULTS.read_text())
    clock_hz, told = targets.parse("v6e:2x4").chip.clock_hz, communication.__doc__
    for size in ("", " wide"):
        plain, low = (results[f"v6e {kind}{size}"] for kind in ("bfloat16", "comm"))
        cycles = [of["estimated_cycles"] for of in (plain, low)]
        sent = [sum(of["collective_bytes"].values()) for of in (plain, low)]
        assert f"{1 - sent[1] / sent[0]:.0%} fewer" in told
        assert f"{cycles[1] / cycles[0]:.1f} times" in told
        even = (sent[0] - sent[1]) / (cycles[1] - cycles[0]) * clock_hz
        assert f" {even / 1e9:.0f} " in told
