"""Memory by arithmetic, against XLA's own account of programs compiled for CPU."""

import dataclasses

import jax
import pytest

from jaxinfra import experiment, options
from jaxinfra.config import MeshConfig
from jaxinfra.plan import analytic, step

GIB = 2**30


def tiny(mesh, **changes):
    config = options.load_config("tiny")
    model = dataclasses.replace(
        config.model, vocab_size=259, width=32, ffn_width=48, num_heads=4,
        num_kv_heads=2, repeats=2,
    )  # fmt: skip
    train = dataclasses.replace(config.train, batch_size=8, length=16)
    parts = {"model": model, "train": train, "mesh": MeshConfig(**mesh)} | changes
    return dataclasses.replace(config, **parts)


def compiled_arguments(config):
    built = experiment.build(config)
    with jax.set_mesh(built.layout.mesh):
        state = built.abstract()
        batch = experiment.abstract_batch(built, step.rows_of(built))
        lowered = built.train_step.lower(state, batch)
    return lowered.compile().memory_analysis().argument_size_in_bytes


@pytest.mark.parametrize(
    "config",
    [
        tiny({"fsdp": 4, "tensor": 2}),
        tiny({"data": 4, "fsdp": 2}, zero=1, precision="bfloat16_params"),
        tiny({"fsdp": 8}, precision="float16"),
        tiny({"pipeline": 2, "fsdp": 2, "tensor": 2}),
        tiny(
            {"data": 2, "fsdp": 4},
            zero=2,
            optimizer=dataclasses.replace(tiny({}).optimizer, name="muon"),
        ),
    ],
    ids=["fsdp4-tensor2", "zero1-bfloat16", "float16", "pipeline", "zero2-muon"],
)
@pytest.mark.slow
def test_what_is_at_rest_is_exactly_the_programs_arguments(config):
    found = analytic.memory(config, 8, GIB)
    assert found.arguments_bytes == compiled_arguments(config)


def test_what_stages_keep_is_as_their_schedule_and_remat_say():
    def temporary(schedule="1f1b", remat="full", microbatches=16, **parallel):
        config = tiny({"pipeline": 4, "data": 2})
        train = {"remat": remat, "microbatches": microbatches, "length": 4096}
        parallel = {"schedule": schedule, "recompute": False, **parallel}
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, repeats=8),
            train=dataclasses.replace(
                config.train, batch_size=2 * microbatches, **train
            ),
            parallel=dataclasses.replace(config.parallel, **parallel),
        )
        return analytic.memory(config, 8, GIB).temporary_bytes

    x_bytes = 4096 * 32 * 4  # of a microbatch between two layers
    fewer = temporary() - temporary(recompute=True)
    # 3 kept, 2 on their way, 2 in passing: of 2 layers each, for 5 of one and 2 of 2.
    assert fewer == 5 * x_bytes
    # Of 4 stages the first has 7 under way.
    assert temporary(balanced="false") == temporary() + (7 - 5) * 2 * x_bytes
    assert temporary(microbatches=32) == temporary(microbatches=16)
    assert temporary("gpipe") > temporary() + (16 - 5) * 2 * x_bytes
    assert temporary(remat="none") > temporary(remat="dots") > temporary()
    assert temporary("zero_bubble") > temporary()


def test_more_fsdp_is_less_at_rest_and_more_remat_is_less_saved():
    one = analytic.memory(tiny({"data": 8}), 8, GIB)
    eight = analytic.memory(tiny({"fsdp": 8}), 8, GIB)
    assert eight.parameters_bytes < one.parameters_bytes / 4
    assert eight.optimizer_bytes < one.optimizer_bytes / 4

    def saved(remat):
        config = tiny({"data": 8})
        train = dataclasses.replace(config.train, remat=remat)
        config = dataclasses.replace(config, train=train)
        return analytic.memory(config, 8, GIB).activations_bytes

    named = "save:query+key+value"
    assert saved("full") < saved(named) < saved("dots") < saved("none")
    assert saved("offload:layer_input") < saved("full") == saved("offload:query")


def test_peak_and_headroom_add_up():
    found = analytic.memory(tiny({"fsdp": 8}), 8, GIB)
    assert found.peak_bytes == found.arguments_bytes + found.temporary_bytes
    assert found.headroom_bytes == GIB - found.peak_bytes
    assert found.arguments_bytes > found.parameters_bytes + found.optimizer_bytes


def test_an_optimizer_on_the_host_is_there_in_part():
    config = tiny({"data": 8})
    model = dataclasses.replace(config.model, width=256, ffn_width=1024, repeats=8)
    train = dataclasses.replace(config.train, length=2)
    optimizer = dataclasses.replace(config.optimizer, name="adamw")
    config = dataclasses.replace(config, model=model, train=train, optimizer=optimizer)
    there = analytic.memory(config, 8, GIB)
    optimizer = dataclasses.replace(optimizer, offload=True)
    away = analytic.memory(dataclasses.replace(config, optimizer=optimizer), 8, GIB)
    assert away.arguments_bytes == there.arguments_bytes - there.optimizer_bytes
    more = away.temporary_bytes - away.gradients_bytes
    largest = 2 * 4 * 8 * 256 * 1024  # both moments of a matrix of eight layers
    assert 2 * largest < more < 3 * largest < there.optimizer_bytes
    assert away.peak_bytes < there.peak_bytes


def test_what_the_model_is_not_fitted_to_is_told():
    assert analytic.limits(tiny({"fsdp": 8})) == []
    [told] = analytic.limits(options.load_config("tiny_moe"))
    assert "experts" in told
    parallel = tiny({}).parallel
    parallel = dataclasses.replace(parallel, schedule="interleaved", virtual_stages=2)
    [told] = analytic.limits(tiny({"pipeline": 2, "fsdp": 4}, parallel=parallel))
    assert "parallel.virtual_stages=2" in told
    optimizer = dataclasses.replace(tiny({}).optimizer, name="muon", offload=True)
    [told] = analytic.limits(tiny({"data": 8}, optimizer=optimizer))
    assert "optimizer.offload" in told
