"""What kernels that carry no time of the compiler's have to multiply."""

import dataclasses

import pytest

from jaxinfra import options
from jaxinfra.config import MeshConfig, ParallelConfig
from jaxinfra.plan.report import by_scope, kernel_flops


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
    for kind, calls in {"ring": 4, "ulysses": 1}.items():
        parallel = ParallelConfig(context=kind)
        split = dataclasses.replace(llama, mesh=mesh, parallel=parallel)
        assert of_attention(split, fwd=calls) == of_attention(llama, fwd=1)


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
        ("jit(step)/update/mul", "update other"),
    ],
)
def test_time_is_told_by_pass_and_named_scope(scope, named):
    assert dict(by_scope({scope: 2.0})) == {named: 2.0}
