"""Options that a compiler does not take are refused before anything is compiled."""

import jax
import pytest

import jaxinfra
from jaxinfra.config import ConfigError
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
