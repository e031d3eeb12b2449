"""Damage on disk is found, named, and never trained on."""

from e2e import command
from e2e.command import STEPS


def test_all_checkpoints_damaged_starts_nothing(cache, quiet, tmp_path):
    run_dir = command.copy_as_of(15, quiet, tmp_path / "run")
    steps = command.saved_steps(run_dir)
    chunks = [command.damage(run_dir / "checkpoints" / str(step)) for step in steps]
    before = command.contents(run_dir)
    done = command.train(cache | {"run.dir": run_dir})
    assert done.returncode == 12, done.stderr
    assert "Traceback" not in done.stderr
    for step, chunk in zip(steps, chunks, strict=True):
        assert f"step {step}" in done.stderr
        assert str(chunk) in done.stderr
    after = command.contents(run_dir)
    for records in (before, after):
        for name in [name for name in records if name.startswith("owner.")]:
            del records[name]
    assert after == before


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(cache, quiet, tmp_path):
    run_dir = command.copy_as_of(15, quiet, tmp_path / "run")
    chunk = command.damage(run_dir / "checkpoints" / "15", "attention/query")
    done = command.train(cache | {"run.dir": run_dir})
    assert done.returncode == 0, done.stderr
    start = command.events(run_dir, "start")[-1]
    assert start["step"] == 10
    [[step, reason]] = start["rejected"]
    assert step == 15
    assert str(chunk) in reason
    assert "attention/query" in reason
    assert command.history(run_dir) == command.history(quiet)
    # What was damaged has been saved again, whole.
    assert chunk.read_bytes() == (quiet / chunk.relative_to(run_dir)).read_bytes()
    assert command.saved_steps(run_dir)[-1] == STEPS
