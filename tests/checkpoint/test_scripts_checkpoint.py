"""`scripts/checkpoint.py`: its exit codes, what it says, and that it needs no jax."""

import os
import subprocess
import sys

import pytest
import small_state

SCRIPT = small_state.ROOT / "scripts/checkpoint.py"


def call(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(small_state.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def run_dir(state, checkpointer, tmp_path):
    for step in (9, 10):
        small_state.save_now(checkpointer, step, state)
    return tmp_path


def test_verify_says_whether_every_byte_is_good(run_dir):
    done = call("verify", run_dir)
    assert (done.returncode, done.stdout) == (0, "2 of 2 steps good\n")
    path = run_dir / "checkpoints/9/arrays/opt/nu/c/0"
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(data)
    for place in (run_dir, run_dir / "checkpoints"):
        done = call("verify", place)
        assert done.returncode == 1
        assert done.stdout.startswith(f"step 9: {path}: its bytes are not those")
        assert done.stdout.endswith("1 of 2 steps good\n")
    assert call("verify", run_dir / "checkpoints/10").returncode == 0


def test_list_shows_a_line_a_step(run_dir):
    (run_dir / "checkpoints/10/manifest.json").write_text("{}")
    lines = call("list", run_dir).stdout.splitlines()
    assert "in 6 arrays, attempt 1, run test" in lines[0]
    assert "damaged" in lines[1]


def test_a_path_that_is_no_run_is_an_input_error(tmp_path):
    for path, says in [(tmp_path, "no folder"), (tmp_path / "x", "is not a folder")]:
        done = call("verify", path)
        assert done.returncode == 2
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_it_loads_no_jax():
    code = "import sys, scripts.checkpoint; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=small_state.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
