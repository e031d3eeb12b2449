"""Options that a compiler does not take are refused before anything is compiled."""

import dataclasses

import jax
import pytest

import jaxinfra
from jaxinfra import experiment, options
from jaxinfra.config import ConfigError, RuntimeConfig
from jaxinfra.mesh import make_mesh


@pytest.fixture
def mesh():
    return make_mesh({"data": 2}, devices=jax.devices()[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("xla_nonsense=1", r"compiler_options='xla_nonsense=1'.*cpu.*No such"),
        ("xla_cpu_enable_fast_math=maybe", "not a valid bool.*name or value"),
    ],
)
def test_what_the_compiler_does_not_take_is_refused_with_its_words(
    mesh, changes, message
):
    with pytest.raises(ConfigError, match=message):
        jaxinfra.accepted_options(mesh, changes)


def test_what_it_takes_is_given_back(mesh):
    found = jaxinfra.accepted_options(mesh, "xla_cpu_enable_fast_math=True")
    assert found == {"xla_cpu_enable_fast_math": "True"}
    assert jaxinfra.accepted_options(mesh) is None


def test_training_and_evaluation_are_compiled_with_them(monkeypatch):
    made_by, jit = {}, jax.jit

    def noted(function, **how):
        made_by[function.__name__] = how.get("compiler_options")
        return jit(function, **how)

    monkeypatch.setattr(jax, "jit", noted)
    runtime = RuntimeConfig(compiler_options="xla_cpu_enable_fast_math=True")
    config = dataclasses.replace(options.load_config("tiny"), runtime=runtime)
    experiment.build(experiment.resolve(config, vocab_size=257), jax.devices()[:1])
    expected = {"xla_cpu_enable_fast_math": "True"}
    assert (made_by["train_step"], made_by["eval_step"]) == (expected, expected)
