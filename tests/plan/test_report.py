"""The figures of a plan that are made of a played program."""

import dataclasses

import pytest

from jaxinfra import options
from jaxinfra.config import MeshConfig, ParallelConfig
from jaxinfra.parallel import splash_parts
from jaxinfra.plan import compilers, cost, report, targets
from jaxinfra.plan.analytic import Memory
from jaxinfra.plan.report import by_scope, kernel_flops

BACKWARD_REST = "backward rest of the step other"


@pytest.fixture(scope="module")
def llama():
    config = options.load_config("llama3_8b")
    return dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=8))


def of_attention(config, devices=8, **calls):
    found = kernel_flops(config, devices, calls)
    assert found.grouped == 0
    return found.attention


def test_attention_is_counted_by_the_pairs_that_see_each_other(llama):
    model, train = llama.model, llama.train
    pairs = train.batch_size * train.length**2 / 2 * model.num_heads / 8
    forward = 2 * 2 * pairs * model.head_width  # two products, two FLOPs a term
    assert of_attention(llama, splash_mqa_fwd_segmented=3) == 3 * forward
    assert of_attention(llama, splash_mqa_dkv=2) == 2 * 2.5 * forward
    apart = of_attention(llama, splash_mqa_dkv=1, splash_mqa_dq=1)
    assert apart == 3.5 * forward  # scores and their gradient in both: 7 products
    assert of_attention(llama, fmhaSoftmaxBackward=1) == 2.5 * forward


def test_turns_of_a_ring_make_one_device_s_share_together(llama):
    mesh = MeshConfig(data=1, fsdp=2, context=4)
    for kind, calls in {"ring": 4, "all_gather": 9, "ulysses": 1}.items():
        parallel = ParallelConfig(context=kind)
        split = dataclasses.replace(llama, mesh=mesh, parallel=parallel)
        assert of_attention(split, fwd=calls) == of_attention(llama, fwd=1)
        if kind == "all_gather":  # of which splash takes all keys at once
            calls = 1
        splash = of_attention(split, splash_mqa_fwd=calls)
        assert splash == of_attention(llama, fwd=1)


def test_very_long_rows_take_calls_of_splash_for_parts_of_the_queries(llama):
    length = 2**20
    train = dataclasses.replace(llama.train, length=length)
    whole = dataclasses.replace(llama, train=train)
    mesh = MeshConfig(data=1, fsdp=1, context=8)
    parallel = ParallelConfig(context="all_gather")
    split = dataclasses.replace(whole, mesh=mesh, parallel=parallel)
    calls = splash_parts.calls_of(length // 8, length)
    assert calls == 3
    found = of_attention(split, splash_mqa_fwd=calls)
    assert found == pytest.approx(of_attention(whole, splash_mqa_fwd=1))


def test_grouped_matmuls_take_each_token_to_its_experts():
    config = options.load_config("mixtral_8x7b")
    mesh = MeshConfig(data=1, fsdp=4, expert=4)
    config = dataclasses.replace(config, mesh=mesh)
    model, train = config.model, config.train
    calls = {"ragged-dot-none": 9.0, "ragged-dot-metadata": 3.0}
    found = kernel_flops(config, 16, calls)
    tokens = train.batch_size * train.length / 16
    assert found.attention == 0
    # Three matrices, forward and twice backward: 6 FLOPs a parameter and token.
    assert model.expert_width > 0
    expert = 3 * model.width * model.expert_width
    assert found.grouped == pytest.approx(6 * tokens * model.experts_per_token * expert)


@pytest.mark.parametrize(
    ("scope", "named"),
    [
        ("jit(step)/jvp(ffn)/while/dot_general", "forward ffn matmul"),
        ("jit(step)/transpose(jvp(ffn))/dot_general", "backward ffn matmul"),
        (
            "jit(step)/transpose(jvp())/rematted_computation/ffn/mul",
            "recomputed ffn other",
        ),
        # In a pipeline, by the branches of its executor.
        ("jit(step)/while/forward/cond/ffn/dot_general", "forward ffn matmul"),
        ("jit(step)/while/forward/cond/jvp(attention)/exp", "forward attention other"),
        ("jit(step)/while/backward/cond/jvp(ffn)/dot_general", "recomputed ffn matmul"),
        (
            "jit(step)/while/backward/cond/transpose(jvp(ffn))/dot_general",
            "backward ffn matmul",
        ),
        # Gradients are summed, and what was kept is read, once.
        ("jit(step)/while/backward/cond/while/body/add", BACKWARD_REST),
        ("jit(step)/while/backward/dynamic_slice", BACKWARD_REST),
        ("jit(step)/while/weight/cond/add", BACKWARD_REST),
        ("jit(step)/while/weight/cond/jvp(ffn)/dot_general", "recomputed ffn matmul"),
        ("jit(step)/while/leave/cond/jvp(loss)/dot_general", "forward loss matmul"),
        ("jit(step)/update/mul", "update other"),
    ],
)
def test_time_is_told_by_pass_and_named_scope(scope, named):
    assert dict(by_scope({scope: 2.0})) == {named: 2.0}


def planned(config, target, played, model_flops):
    """`report.plan` of what was played, of a program that takes no memory."""
    return report.plan(
        config,
        targets.parse(target),
        memory=Memory(**{field.name: 0 for field in dataclasses.fields(Memory)}),
        compiled=compilers.Compiled("", 0, 0, 0, 0, 0, 0.0),
        played=played,
        model_flops=model_flops,
        options={},
        versions={},
    )


def played(**changes):
    nothing = {"flops": {}, "sent": {}, "waited": {}, "calls": {}, "paid_kernels": {}}
    made = {"compute_secs": 1.0, "waiting_secs": 0.0, "scopes": {}, "unknown_loops": 0}
    return cost.Cost(**nothing | made | changes)


AGAIN = "jit(step)/transpose(jvp())/rematted_computation"


def test_the_share_of_remat_is_what_is_done_again_and_not_padding(llama):
    """Of 10 the model needs 4 and 2 are done again; likewise one of two kernels."""
    flops = {"jit(step)/jvp(ffn)/dot_general": 8.0, f"{AGAIN}/ffn/dot_general": 2.0}
    found = planned(llama, "v5p:2x2x2", played(flops=flops), 4.0)["compute"]
    assert found["hardware_flops"] == 10
    assert found["remat_frac"] == pytest.approx(0.2)
    assert found["other_frac"] == pytest.approx(0.4)
    no_remat = {"jit(step)/jvp(ffn)/dot_general": 10.0}
    found = planned(llama, "v5p:2x2x2", played(flops=no_remat), 4.0)["compute"]
    assert found["remat_frac"] == 0
    calls = {("fwd", "jit(step)/jvp(attention)"): 1, ("fwd", f"{AGAIN}/attention"): 1}
    found = planned(llama, "v5p:2x2x2", played(calls=calls), 4.0)["compute"]
    assert found["kernel_calls"] == {"fwd": 2}
    assert found["remat_frac"] == pytest.approx(0.5)


def test_rows_of_the_wire_add_up_to_the_waiting(llama):
    key = ("all-gather", "fsdp")
    sent = {(*key, "async"): 8.0, (*key, "sync"): 4.0}
    waited = {(*key, "async"): 0.25, (*key, "sync"): 0.5}
    of = played(sent=sent, waited=waited, waiting_secs=0.75, flops={"": 8.0})
    found = planned(llama, "v5p:2x2x2", of, 4.0)
    assert [w["waited_secs"] for w in found["wire"]] == [0.25, 0.5]


def test_kernels_take_the_time_of_all_devices_and_count_for_one(llama):
    scope = "jit(step)/while/forward/cond/jvp(attention)"
    of = played(calls={("fwd", scope): 32.0}, paid_kernels={"fwd": 39.0})
    found = planned(llama, "v5p:2x2x2", of, 4.0)["compute"]
    chip = targets.parse("v5p:2x2x2").chip
    assert found["kernel_flops"] == of_attention(llama, fwd=32)
    paid = of_attention(llama, fwd=39) / (chip.attention_share * chip.peak_flops)
    assert found["kernel_secs"] == pytest.approx(paid)


def test_cycles_are_told_where_a_compiler_estimates_them(llama):
    of = played(flops={"": 8.0}, compute_secs=0.5)
    found = planned(llama, "v5p:2x2x2", of, 4.0)
    assert found["compute"]["cycles"] == 0.5 * 1.75e9
    assert found["sources"] == [*report.SOURCES]
    assert "(875,000,000 cycles" in report.text(found)
    found = planned(llama, "h100:1x8", of, 4.0)
    assert found["compute"]["cycles"] is None
    assert "cycles by" not in report.text(found)
