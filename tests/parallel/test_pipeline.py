"""A pipeline gives the loss and the gradients of one device, by every schedule."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from parallel import pipelines, tiny_runs
from parallel.pipelines import EXPERTS, ODD, ODD_EXPERTS

from jaxinfra import experiment, params
from jaxinfra.config import MeshConfig, ParallelConfig
from jaxinfra.parallel import schedules
from jaxinfra.train import objective

LOSS = 1e-5  # relative: float32 sums in another order
GRADIENT = 1e-4  # the same, of each tensor; a wrong term is at least 1e-2
SAME = 1e-6  # the same products and sums, fused otherwise
BFLOAT16 = 3e-2  # 8-bit mantissa, and sums over microbatches rounded at other places

QUICK = [
    ({"pipeline": 2, "fsdp": 2, "tensor": 2}, {"model": {"repeats": 3}, "zero": 2}),
]
# Pairwise: each mesh meets several schedules, each schedule several stacks and remats.
MORE = [
    (
        {"pipeline": 2, "data": 2},
        {"schedule": "zero_bubble", "remat": "full", "model": {"tied": False}},
    ),
    ({"pipeline": 2, "data": 2, "tensor": 2}, {"schedule": "gpipe", "recompute": True}),
    ({"pipeline": 4}, {"schedule": "gpipe", "microbatches": 2, "remat": "dots"}),
    (
        {"pipeline": 2, "tensor": 2},
        {
            "schedule": "interleaved",
            "virtual": 2,
            "label_smoothing": 0.1,
            "recompute": True,
        },
    ),
    (
        {"pipeline": 2, "fsdp": 4},
        {"schedule": "interleaved", "virtual": 2, "zero": 3, "microbatches": 2},
    ),
    (
        {"pipeline": 2},
        {"schedule": "interleaved", "virtual": 3, "model": {"repeats": 7}},
    ),
    ({"pipeline": 2, "fsdp": 2}, {"model": ODD, "remat": "none", "zero": 3}),
    (
        {"pipeline": 2},
        {"schedule": "zero_bubble", "model": ODD, "remat": "dots", "recompute": True},
    ),
    (
        {"pipeline": 3, "data": 2},
        {"model": {"repeats": 5}, "remat": "save:attention+ffn_in"},
    ),
    ({"pipeline": 2, "data": 4}, {"microbatches": 1}),
    ({"pipeline": 4}, {"microbatches": 8, "balanced": "false"}),
    ({"pipeline": 2, "context": 2}, {"way": "ulysses", "schedule": "zero_bubble"}),
    (
        {"pipeline": 2, "context": 4},
        {"way": "all_gather", "remat": "full", "recompute": True},
    ),
    (
        {"pipeline": 4, "data": 2},
        {
            "schedule": "zero_bubble",
            "model": {
                "positions": "learned",
                "max_length": 27,
                "norm": "layernorm",
                "norm_placement": "both",
                "activation": "gelu",
                "mlp_bias": True,
                "qkv_bias": True,
                "out_bias": True,
            },
            "z_loss": 1e-2,
        },
    ),
    (
        {"pipeline": 2},
        {"model": {"document_mask": False, "logit_softcap": 5.0}, "unroll": True},
    ),
]
# Experts: each way to meet them, and what they tell in the loss.
TOLD = {"balance_loss": 0.1, "router_z_loss": 0.01}
WITH_EXPERTS = [
    ({"pipeline": 2, "expert": 2}, {"model": EXPERTS | {"repeats": 3}, **TOLD}),
    (
        {"pipeline": 2, "expert": 2, "tensor": 2},
        {
            "schedule": "zero_bubble",
            "model": ODD_EXPERTS | {"capacity_factor": 1.0},
            "router_bias_rate": 1e-3,
            "recompute": True,
            **TOLD,
        },
    ),
    (
        {"pipeline": 2, "data": 2, "context": 2},
        {
            "schedule": "interleaved",
            "virtual": 2,
            "way": "all_gather",
            "model": EXPERTS,
            "experts": "dense",
            **TOLD,
        },
    ),
    (
        {"pipeline": 2, "fsdp": 2, "expert": 2},
        {
            "schedule": "gpipe",
            "model": EXPERTS,
            "remat": "full",
            "microbatches": 2,
            **TOLD,
        },
    ),
    (
        {"pipeline": 2, "expert": 2, "tensor": 2},
        {
            "schedule": "zero_bubble",
            "model": EXPERTS,
            "remat": "save:ffn_in+attention",
        },
    ),
]
# Of both forms of a backward pass: each schedule, and all that a layer may keep.
TWICE = [
    {"schedule": "1f1b", "remat": "save:attention+ffn_in"},
    {"schedule": "gpipe", "remat": "full", "model": ODD},
    {"schedule": "interleaved", "virtual": 2, "model": EXPERTS, **TOLD},
    {"schedule": "zero_bubble", "remat": "dots", "model": {"dropout": 0.3}},
]


def check(sizes, settings):
    config = pipelines.config(sizes, **settings)
    expected, held_out, weights = pipelines.gradients(pipelines.serial(config))
    found, found_held_out, _ = pipelines.gradients(config, weights)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=LOSS)
    assert found_held_out[0] == pytest.approx(held_out[0], rel=LOSS)
    assert found.aux.weight_sum == expected.aux.weight_sum
    for name, value in expected.aux.metrics.items():
        assert found.aux.metrics[name] == pytest.approx(value, rel=LOSS, abs=LOSS)
    for path, load in params.named(expected.aux.stats):
        np.testing.assert_array_equal(dict(params.named(found.aux.stats))[path], load)
    far = pipelines.distance(found.grads, expected.grads)
    assert max(far.values()) < GRADIENT, far


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        *QUICK,
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [*MORE, *WITH_EXPERTS]
        ),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(sizes, settings):
    check(sizes, settings)


@pytest.mark.parametrize(
    ("recompute", "balanced", "most"),
    [(False, "true", 3), (False, "false", 7), (True, "auto", 3)],
)
def test_a_stage_keeps_its_layers_inputs_or_its_own(recompute, balanced, most):
    """By the loop over ticks: of 4 stages the first has 7 microbatches under way, the
    last 1; balanced, one of 4 is on its way."""
    settings = {"schedule": "1f1b", "remat": "full", "recompute": recompute}
    settings |= {"model": {"repeats": 20}, "microbatches": 8, "balanced": balanced}
    config = pipelines.config({"pipeline": 4}, **settings)
    built = pipelines.build(config)
    with jax.set_mesh(built.layout.mesh):
        here = pipelines.placed(built, pipelines.first_params(built))
        args = (here, (), pipelines.rows(built), None)
        program = str(jax.make_jaxpr(built.task.grad_fn)(*args))
    program = re.sub(r"@(\w+|\([\w,]*\))", "", program)  # how arrays are laid out
    rows, layers = pipelines.ROWS // config.train.microbatches, 5
    shape = lambda *first: f"f32[{','.join(map(str, first))},{rows},24"
    assert (shape(most, layers) in program) is not recompute
    assert (shape(most) in program) is recompute


@pytest.mark.slow
@pytest.mark.parametrize("settings", TWICE)
def test_what_is_kept_is_what_would_be_computed_again(settings):
    sizes = {"pipeline": 2, "tensor": 2}
    kept, _, weights = pipelines.gradients(pipelines.config(sizes, **settings))
    again = pipelines.config(sizes, **settings, recompute=True)
    far = pipelines.distance(pipelines.gradients(again, weights)[0].grads, kept.grads)
    assert max(far.values()) < SAME, far


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ({"pipeline": 4}, {"remat": "full"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ({"pipeline": 3}, {"model": ODD, "remat": "none"}),
                ({"pipeline": 4, "tensor": 2}, {"schedule": "zero_bubble"}),
                (
                    {"pipeline": 2, "expert": 2},
                    {
                        "schedule": "interleaved",
                        "virtual": 2,
                        "microbatches": 4,
                        "model": EXPERTS,
                        **TOLD,
                    },
                ),
                ({"pipeline": 4}, {"recompute": True, "precision_name": "bfloat16"}),
            ]
        ),
    ],
)
def test_what_is_lent_comes_back_as_it_was(sizes, settings):
    """To the bit: what is computed is the same, wherever it is kept."""
    settings = {"microbatches": 8} | settings
    balanced = pipelines.config(sizes, **settings)
    schedule = schedules.schedule_of(balanced, sizes["pipeline"])
    assert schedule.is_balanced
    lent, _, weights = pipelines.gradients(balanced)
    plain = pipelines.config(sizes, **settings, balanced="false")
    kept, _, _ = pipelines.gradients(plain, weights)
    jax.tree.map(np.testing.assert_array_equal, lent, kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "parallel", "zero"),
    [
        ({"pipeline": 2, "fsdp": 2, "tensor": 2}, {"schedule": "1f1b"}, -1),
        ({"pipeline": 2, "data": 2}, {"schedule": "zero_bubble"}, 2),
    ],
)
def test_twenty_steps_are_those_of_one_device(
    documents, reference, first_params, sizes, parallel, zero
):
    config = dataclasses.replace(
        tiny_runs.tiny(microbatches=4, dropout=0.1),
        mesh=MeshConfig(**{"data": 1, **sizes}),
        parallel=ParallelConfig(**parallel),
        zero=zero,
    )
    found = tiny_runs.run(config, documents, first=first_params)
    expected = reference(optimizer="adamw", dropout=0.1)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0, atol=LOSS)
    np.testing.assert_array_equal(found["tokens"], expected["tokens"])
    assert expected["loss"][-1] < expected["loss"][0] - 1.0, "it must have learned"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrow_precisions_are_as_near_as_they_are_on_one_device(name):
    sizes = {"pipeline": 2, "data": 2, "tensor": 2}
    config = pipelines.config(sizes, precision_name=name)
    expected, _, weights = pipelines.gradients(pipelines.serial(config))
    found, _, _ = pipelines.gradients(config, weights)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=BFLOAT16)
    far = pipelines.distance(found.grads, expected.grads)
    assert max(far.values()) < BFLOAT16, far


@pytest.mark.slow
def test_an_unfitting_batch_of_evaluation_runs_in_fewer_microbatches():
    config = pipelines.config({"pipeline": 2, "data": 2}, microbatches=3)
    table = schedules.forward_only(stages=2, virtual=1, microbatches=1)
    built = pipelines.build(
        dataclasses.replace(
            config, train=dataclasses.replace(config.train, batch_size=12)
        )
    )
    with jax.set_mesh(built.layout.mesh):
        here = pipelines.placed(built, pipelines.first_params(built))
        text = str(
            jax.make_jaxpr(built.task.loss_fn)(here, (), pipelines.rows(built), None)
        )
    assert f"length={table.ticks}" in text


@pytest.mark.slow
def test_1f1b_keeps_as_much_for_any_number_of_microbatches_and_gpipe_more():
    """By the compiler; rows of a microbatch stay as many, so the batch grows."""

    def temporary_bytes(schedule, microbatches):
        config = pipelines.config({"pipeline": 2}, schedule=schedule, remat="full")
        train = {"microbatches": microbatches, "batch_size": 4 * microbatches}
        train = dataclasses.replace(config.train, length=64, **train)
        built = pipelines.build(dataclasses.replace(config, train=train))
        place = experiment.batch_sharding(built.layout)
        of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        shape = (train.batch_size, train.length + 1)
        tokens, segments = of(np.int32, *shape), of(np.int32, *shape)
        batch = objective.Rows(tokens, segments, of(np.uint32, shape[0]))
        with jax.set_mesh(built.layout.mesh):
            weights = built.abstract().params
            lowered = jax.jit(built.task.grad_fn).lower(weights, (), batch, None)
            program = lowered.compile(pipelines.QUICK)
        # What is the same for all: the batch's own tokens, targets, positions.
        return program.memory_analysis().temp_size_in_bytes

    x_bytes = 4 * 4 * 64 * 16  # of a microbatch between two layers
    grown = temporary_bytes("1f1b", 16) - temporary_bytes("1f1b", 4)
    assert grown < 12 * x_bytes / 2  # ids of tokens alone, 5 arrays of them
    grown = temporary_bytes("gpipe", 16) - temporary_bytes("gpipe", 4)
    assert grown > 12 * 2 * x_bytes  # inputs of chunks, and gradients of their outputs


def test_padded_layers_of_an_uneven_stack_stay_zero():
    config = pipelines.config({"pipeline": 2}, model={"repeats": 3})
    built = pipelines.build(config)
    state = built.abstract()
    stored = [w for path, w in params.named(state.params) if path.startswith("pattern")]
    assert {w.shape[0] for w in stored} == {4}
    assert {w.sharding.spec[0] for w in stored} == {"pipeline"}
    with jax.set_mesh(built.layout.mesh):
        first = jax.device_get(built.init().params)
    assert all(not w[3:].any() for w in jax.tree.leaves(first["pattern"]))


def test_a_schedule_is_shown_by_check():
    config = pipelines.config({"pipeline": 2}, schedule="zero_bubble")
    notes = pipelines.build(config).task.notes
    assert "zero_bubble: 2 stages x 1 virtual, 4 microbatches, 6 ticks" in notes
    assert "stage 1  forward" in notes
