"""The commands of scripts/plan_rows.py and the points of scripts/memory_points.py."""

import importlib.util
import pathlib
import shlex

import jax
import pytest

from jaxinfra import options
from jaxinfra.plan import analytic, step, targets

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rows, points = script("plan_rows"), script("memory_points")


@pytest.mark.parametrize("name", rows.ROWS)
def test_every_row_is_a_config_that_its_target_takes(name):
    words = shlex.split(rows.ROWS[name])
    at = words.index("--target")
    target = targets.parse(words[at + 1])
    rest = [*words[:at], *words[at + 2 :], "--runtime.devices", str(target.num_devices)]
    config, _ = options.read_command(rest)
    analytic.memory(config, target.num_devices, target.chip.hbm_bytes)


def test_a_point_is_the_same_whenever_it_is_drawn_and_near_the_limit():
    words, name = points.drawn(3, 4)
    assert (words, name) == points.drawn(3, 4)
    assert words != points.drawn(3, 5)[0]
    target = targets.parse(name)
    share = points.analytic_bytes(words, target) / target.chip.hbm_bytes
    assert 0.7 < share < 1.25


@pytest.mark.parametrize("fits", [True, False])
def test_a_point_that_the_compiler_refuses_has_the_bytes_that_it_says(
    fits, monkeypatch
):
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    found = {"memory": {"peak_bytes": 3 * 10**9}}
    compiled = object() if fits else None
    monkeypatch.setattr(step, "plan_step", lambda *asked: (found, compiled))
    words, name = points.drawn(3, 4)
    told = points.measured(words, name)
    assert (told["compiled_gb"], told["fits"]) == (3.0, fits)
