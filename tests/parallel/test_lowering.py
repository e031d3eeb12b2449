"""The whole donated training step of every shipped config, lowered without hardware on
a mesh of the size that the config's docstring names."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIMIT_SECS = 60.0
FEW = ("tiny", "gpt2_124m", "llama3_8b")
REST = (
    "shakespeare_char", "smollm2_135m", "llama3_70b", "llama3_405b", "tiny_moe",
    "mixtral_8x7b",
)  # fmt: skip


def stated_devices(name):
    """By the line `Mesh: fsdp 8 x tensor 1 (...)` of the docstring; one without it."""
    source = (ROOT / "configs" / f"{name}.py").read_text()
    stated = re.search(r"Mesh: fsdp (\d+) x tensor (\d+)", source)
    return int(stated[1]) * int(stated[2]) if stated else 1


def report(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/parallel/lower_step.py"), name],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in REST)]
)
def test_the_whole_step_lowers_with_explicit_shardings(name):
    found = report(name)
    assert found["secs"] < LIMIT_SECS
    assert found["devices"] == stated_devices(name)
    assert found["explicit"]
    split_over = set(found["params_split_over"])
    assert split_over - {"expert", "context"} == {"fsdp", "pipeline", "tensor"}
    assert found["donated"] == found["leaves"], "every array of the state is donated"
    assert found["state_keeps_its_layout"]
