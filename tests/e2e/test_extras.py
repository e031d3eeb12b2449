"""What a run can be asked for besides training."""

import subprocess
import sys

import pytest
from e2e import command

PREPARE = command.ROOT / "scripts" / "prepare.py"


def test_check_prints_the_parameters_and_writes_no_run_folder(cache, tmp_path):
    run_dir = tmp_path / "run"
    done = command.train(cache | {"run.dir": run_dir, "check": "true"})
    assert done.returncode == 0, done.stderr
    assert "attention/query" in done.stdout
    assert "37,152" in done.stdout
    assert not run_dir.exists()


@pytest.mark.slow
def test_a_profile_a_further_set_and_a_sample(cache, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    prepared = tmp_path / "other"
    subprocess.run(
        [sys.executable, PREPARE, text, "--out", prepared, "--held_out=0"],
        check=True,
        capture_output=True,
    )
    run_dir = tmp_path / "run"
    done = command.train(
        cache
        | {
            "run.dir": run_dir,
            "train.steps": 4,
            "profile.start": 2,
            "profile.steps": 2,
            "eval.sets.fox": prepared,
            "sample.tokens": 8,
            "sample.prompt": "ROMEO:",
        }
    )
    assert done.returncode == 0, done.stderr
    # Two steps from step 2 on are the last two: the trace is whole all the same.
    assert list(run_dir.glob("profile/**/*.xplane.pb"))
    last = command.metrics(run_dir)[-1]
    assert 0 < last["eval/fox/loss"] < 10
    assert last["eval/loss"] == last["eval/held_out/loss"] != last["eval/fox/loss"]
    assert "--- sample ---\nROMEO:" in done.stderr + done.stdout


def test_a_set_of_another_tokenizer_is_refused(cache, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("The quick brown fox.\n" * 60)
    prepared, flags = tmp_path / "other", ("--held_out=0", "--tokenizer=char")
    subprocess.run(
        [sys.executable, PREPARE, text, "--out", prepared, *flags],
        check=True,
        capture_output=True,
    )
    run_dir = tmp_path / "run"
    done = command.train(cache | {"run.dir": run_dir, "eval.sets.fox": prepared})
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: eval.sets.fox=")
    assert not run_dir.exists()


@pytest.mark.slow
def test_two_devices_on_as_many_cores_do_not_wait_for_each_other_for_ever(
    cache, tmp_path
):
    devices = {"runtime.cpu_devices": 2, "mesh.fsdp": 2, "train.steps": 12}
    done = command.train(cache | devices | {"run.dir": tmp_path / "run"})
    assert done.returncode == 0, done.stderr
