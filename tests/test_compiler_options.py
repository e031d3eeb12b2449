"""The table of compiler options, and how a key changes it."""

import dataclasses

import jax
import pytest

from jaxinfra import checks, compiler_options, options
from jaxinfra.config import ConfigError

V5P = "TPU v5"
VMEM = "xla_tpu_scoped_vmem_limit_kib"


def test_a_target_has_its_options_and_another_none():
    assert compiler_options.for_device(V5P)[VMEM] == "65536"
    assert compiler_options.for_device("cpu") == {}


def test_each_option_can_be_changed_dropped_and_added():
    table = compiler_options.for_device(V5P)
    changed = compiler_options.for_device(V5P, f"{VMEM}=32768")
    assert changed == table | {VMEM: "32768"}
    dropped = compiler_options.for_device(V5P, f"{VMEM}=")
    assert dropped == {k: v for k, v in table.items() if k != VMEM}
    assert compiler_options.for_device(V5P, "none,xla_a=1") == {"xla_a": "1"}
    assert compiler_options.for_device("cpu", "xla_a=1") == {"xla_a": "1"}


def test_the_table_itself_stays_as_it_is():
    before = {kind: dict(table) for kind, table in compiler_options.OPTIONS.items()}
    compiler_options.for_device(V5P, "none")
    assert before == compiler_options.OPTIONS


@pytest.mark.parametrize(
    "text", ["vmem=1", "xla_tpu_x", "xla_a=1;xla_b=2,y", "xla_-=1"]
)
def test_a_wrong_form_is_refused_before_anything_is_built(text):
    config = options.load_config("tiny")
    runtime = dataclasses.replace(config.runtime, compiler_options=text)
    with pytest.raises(ConfigError, match=r"runtime\.compiler_options"):
        checks.check(dataclasses.replace(config, runtime=runtime))


def test_the_options_reach_the_compiler():
    """One that it does not know is refused by it: so it was asked."""
    lowered = jax.jit(
        lambda x: x + 1, compiler_options=compiler_options.for_device("cpu", "xla_no=1")
    ).lower(1.0)
    with pytest.raises(Exception, match="xla_no"):
        lowered.compile()
