"""`scripts/checkpoint.py`: its exit codes, what it says, and that it needs no jax."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_state

from jaxinfra.resilience import ownership

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


def test_inspect_shows_arrays_origin_and_config(run_dir):
    done = call("inspect", f"{run_dir}@9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"step 9 in {run_dir / 'checkpoints/9'}\n")
    assert "run test, attempt 1" in done.stdout
    assert "jaxinfra" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["params/embedding", "float32", "257", "x", "6", "6,168", "8"] in rows
    assert ["opt/count", "int32", "scalar", "4", "1"] in rows
    assert "train.steps = 40" in done.stdout
    assert 'data {"row": 12}' in done.stdout
    assert call("inspect", run_dir).stdout.startswith("step 10 ")


def test_inspect_passes_over_a_damaged_step_and_names_steps_that_are_there(run_dir):
    (run_dir / "checkpoints/10/manifest.json").write_text("{}")
    assert call("inspect", run_dir).stdout.startswith("step 9 ")
    done = call("inspect", f"{run_dir}@7")
    assert done.returncode == 2
    assert "has no step 7, only [10, 9]" in done.stderr


def test_diff_tells_settings_and_how_far_arrays_are_apart(checkpointer, tmp_path):
    values = {"params/a": np.arange(6, dtype=np.float32), "n": np.int32(3)}
    for step, change in ((1, 0), (2, 0), (3, 0.5)):
        a = values["params/a"].copy()
        a[4] += change
        checkpointer.save(
            step,
            {"params/a": jax.device_put(a), "n": jax.device_put(values["n"])},
            metadata={"config": {"x": {"y": step // 3}}, "data": {}},
        )
        checkpointer.wait()
    checkpointer.close()
    same = call("diff", f"{tmp_path}@2", f"{tmp_path}@2")
    assert (same.returncode, same.stdout[:6]) == (0, "equal:")
    done = call("diff", f"{tmp_path}@2", f"{tmp_path}@3")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "config x.y: 0 -> 1",
        "array params/a: 1 of 6 differ, by 0.5 at most, relative 0.111",
    ]


def test_prune_keeps_the_newest_good_steps_and_asks_first(run_dir, state):
    chunk = run_dir / "checkpoints/10/arrays/opt/nu/c/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    told = call("prune", run_dir, "--keep", "1")
    assert "step 10 stays and does not count" in told.stdout
    assert "deleted" in told.stdout.splitlines()[-1]
    done = call("prune", run_dir, "--keep", "1", "--yes")
    assert done.returncode == 0, done.stderr
    # 9 is the only good one.
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["10", "9"]
    assert call("prune", run_dir, "--keep", "0", "--yes").returncode == 2


def test_prune_deletes_what_is_older(run_dir):
    done = call("prune", run_dir, "--keep", "1", "--yes")
    assert "step 9 is deleted" in done.stdout
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["10"]


def test_of_two_saves_of_a_step_the_later_one_counts(run_dir):
    steps = run_dir / "checkpoints"
    shutil.copytree(steps / "10", steps / "10.replaced")
    assert call("inspect", run_dir).stdout.startswith(f"step 10 in {steps / '10'}\n")
    done = call("prune", run_dir, "--keep", "1", "--yes")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in steps.iterdir()] == ["10"]


def test_prune_leaves_a_run_that_lives_alone(run_dir):
    owner = ownership.acquire(run_dir)
    try:
        done = call("prune", run_dir, "--keep", "1", "--yes")
    finally:
        owner.release()
    assert done.returncode == 16
    assert f"pid {os.getpid()}" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((run_dir / "checkpoints").iterdir())) == 2


@pytest.mark.slow
def test_export_and_import_give_the_same_step(run_dir, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    done = call("export", f"{run_dir}@9", "--to", out, "--format", "safetensors")
    assert done.returncode == 0, done.stderr
    again = call("export", f"{run_dir}@9", "--to", out, "--format", "safetensors")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    like = ("--like", run_dir)
    done = call("import", out, "--to", other, "--step", "9", *like)
    assert done.returncode == 0, done.stderr
    done = call("diff", f"{run_dir}@9", other)
    assert (done.returncode, done.stdout[:6]) == (0, "equal:")
    again = call("import", out, "--to", other, "--step", "9", *like)
    assert again.returncode == 2
    assert "has step 9 already" in again.stderr
