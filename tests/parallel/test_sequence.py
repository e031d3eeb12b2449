"""Activations cut along the length over tensor; that the numbers stay is in
`test_meshes`, whose tensor meshes have it."""

import dataclasses

import jax
import pytest

from jaxinfra import experiment, options, sharding, tasks
from jaxinfra.config import MeshConfig
from jaxinfra.plan import step


def tiny(mesh=None, **changes):
    config = options.load_config("tiny")
    model = dataclasses.replace(
        config.model, vocab_size=264, width=16, ffn_width=24, num_heads=2,
        num_kv_heads=2, repeats=2,
    )  # fmt: skip
    train = dataclasses.replace(config.train, batch_size=4, length=12)
    mesh = MeshConfig(**(mesh or {"fsdp": 2, "tensor": 2}))
    parts = {"model": model, "train": train, "mesh": mesh} | changes
    return dataclasses.replace(config, **parts)


def rules_of(config):
    layout = experiment.lay_out(config, jax.devices()[:4])
    return tasks.activation_rules(config, layout)


def test_a_device_of_the_tensor_axis_keeps_its_part_of_the_length():
    rules = rules_of(tiny())
    assert sharding.spec(rules, "batch", "residual") == jax.P(
        ("data", "fsdp", "expert"), ("context", "tensor")
    )
    assert sharding.spec(rules, "length") == jax.P("context")


@pytest.mark.parametrize(
    "config",
    [
        tiny(parallel=dataclasses.replace(tiny().parallel, sequence=False)),
        tiny(train=dataclasses.replace(tiny().train, length=13)),
    ],
    ids=["not wanted", "odd length"],
)
def test_elsewhere_activations_are_whole(config):
    assert rules_of(config).residual == ("context",)


@pytest.mark.slow
def test_the_stack_saves_half_a_length_a_device_where_tensor_is_2():
    """Of the compiled program: with remat full, each layer's input is what is kept."""

    def temporary_bytes(config):
        built = experiment.build(config, jax.devices()[:4])
        with jax.set_mesh(built.layout.mesh):
            batch = experiment.abstract_batch(built, step.rows_of(built))
            compiled = built.train_step.lower(built.abstract(), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    model = dataclasses.replace(tiny().model, repeats=32)
    train = dataclasses.replace(tiny().train, length=128, remat="full")
    whole = dataclasses.replace(tiny().parallel, sequence=False)
    config = tiny(model=model, train=train)
    layer_inputs = 32 * 2 * 128 * 16 * 4  # layers, rows, tokens, width, float32
    saved = temporary_bytes(dataclasses.replace(config, parallel=whole))
    saved -= temporary_bytes(config)
    assert saved > layer_inputs / 3
