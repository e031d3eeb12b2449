"""What the TPU's own compiler makes of split rows and experts; needs libtpu beside
jax."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("tpu_programs.py")
# What must be in the compiled step of each kind.
EXPECTED = {
    "ring": ["collective-permute", "splash"],
    "all_gather": ["all-gather", "reduce-scatter", "splash"],
    "dropless": ["ragged-all-to-all"],
    "bounded": ["all-to-all"],
}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
@pytest.mark.parametrize("kind", EXPECTED)
def test_the_compiled_step_has_its_exchange(kind):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), kind],
        capture_output=True,
        text=True,
        cwd=PROGRAM.parents[2],
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for what in EXPECTED[kind]:
        assert any(what in name and count for name, count in found.items()), found
    # Stages of a pipeline, which do different things, cannot send to each other in it.
    if kind == "all_gather":
        assert not any("collective-permute" in name for name in found), found
