"""A run whose last save is not committed says so: exit 15."""

import resource

import pytest
from e2e import command
from e2e.command import STEPS

# Above metrics.jsonl (18 KB), below the 33 KB of the embedding.
SAVES_FAIL = 28_000
# Above config.json (4 KB), below metrics.jsonl at the end.
METRICS_FAIL = 8_000


def _limit_files(num_bytes: int):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return limit


@pytest.mark.slow
def test_a_full_disk_at_every_save_ends_with_15_and_loses_no_save(
    cache, quiet, tmp_path
):
    run_dir = command.copy_as_of(25, quiet, tmp_path / "run")
    settings = cache | {"run.dir": run_dir}
    kept = command.contents(run_dir / "checkpoints")
    done = command.train(settings, preexec_fn=_limit_files(SAVES_FAIL))
    assert done.returncode == 15, done.stderr
    assert "Traceback" not in done.stderr
    failed = command.events(run_dir, "save_failed")
    reasons = "".join(event["reason"] for event in failed)
    assert [f"save of step {step} failed" in reasons for step in (30, 35, 36)]
    assert "File too large" in reasons
    assert command.events(run_dir, "end")[-1]["code"] == 15
    assert command.contents(run_dir / "checkpoints") == kept

    # Space again: the same command goes on from the last good save.
    done = command.train(settings)
    assert done.returncode == 0, done.stderr
    assert command.events(run_dir, "start")[-1]["step"] == 25
    assert command.history(run_dir) == command.history(quiet)
    assert command.saved_steps(run_dir)[-1] == STEPS


def test_a_file_where_the_checkpoints_go_ends_with_15(cache, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("mine")
    done = command.train(cache | {"run.dir": run_dir, "train.steps": 2})
    assert done.returncode == 15, done.stderr
    assert "Traceback" not in done.stderr
    [failed] = command.events(run_dir, "save_failed")
    assert "checkpoints" in failed["reason"]
    assert (run_dir / "checkpoints").read_text() == "mine"


@pytest.mark.slow
def test_a_disk_too_full_for_metrics_ends_with_15_and_goes_on(cache, quiet, tmp_path):
    run_dir = tmp_path / "run"
    settings = cache | {"run.dir": run_dir}
    done = command.train(settings, preexec_fn=_limit_files(METRICS_FAIL))
    assert done.returncode == 15, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr

    # The line that was cut short is taken back too.
    done = command.train(settings)
    assert done.returncode == 0, done.stderr
    assert command.history(run_dir) == command.history(quiet)
