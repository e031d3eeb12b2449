"""What may change between two starts of a run, and what may not."""

import pytest
from e2e import command
from e2e.command import STEPS

# float32 sums in another order: over 20 updates the loss, about 4, moves by 1e-6.
OTHER_MESH = 1e-5
LONGER = STEPS + 2


def test_a_changed_learning_rate_is_refused_with_a_diff(cache, quiet, tmp_path):
    run_dir = command.copy_as_of(15, quiet, tmp_path / "run")
    before = command.contents(run_dir)
    settings = cache | {"run.dir": run_dir, "optimizer.learning_rate": 0.002}
    done = command.train(settings | {"model.ffn_width": 96})
    assert done.returncode == 2, done.stderr
    assert "optimizer.learning_rate: 0.02 -> 0.002" in done.stderr
    assert "model.ffn_width: 64 -> 96" in done.stderr
    assert "--run.accept_changes true" in done.stderr
    assert "train.steps" not in done.stderr
    assert "Traceback" not in done.stderr
    assert command.contents(run_dir) == before

    done = command.train(settings | {"run.accept_changes": "true"})
    assert done.returncode == 0, done.stderr
    assert command.events(run_dir, "start")[-1]["step"] == 15
    ours, theirs = command.history(run_dir), command.history(quiet)
    assert len(ours) == STEPS
    # The loss of step 16 is of the old weights; the next ones saw the new rate.
    assert ours[:16] == theirs[:16]
    assert ours[16][1] != theirs[16][1]
    assert [line[3] for line in ours] == [line[3] for line in theirs]


@pytest.mark.slow
def test_accepted_changes_that_alter_the_arrays_are_refused(cache, quiet, tmp_path):
    run_dir = command.copy_as_of(15, quiet, tmp_path / "run")
    done = command.train(
        cache
        | {"run.dir": run_dir, "model.ffn_width": 96, "run.accept_changes": "true"}
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "ffn" in done.stderr
    assert command.history(run_dir) == command.history(quiet)


@pytest.mark.slow
def test_a_run_goes_on_longer_on_another_mesh(cache, quiet, tmp_path):
    run_dir = command.copy_as_of(15, quiet, tmp_path / "run")
    done = command.train(
        cache
        | {
            "run.dir": run_dir,
            "train.steps": LONGER,
            "train.microbatches": 2,
            "train.save_every": 7,
            "runtime.cpu_devices": 4,
            "mesh.fsdp": 2,
            "mesh.tensor": 2,
            "zero": 2,
        }
    )
    assert done.returncode == 0, done.stderr
    assert command.events(run_dir, "start")[-1]["step"] == 15
    ours, theirs = command.history(run_dir), command.history(quiet)
    assert [line[0] for line in ours] == list(range(1, LONGER + 1))
    losses, expected = ([line[1] for line in run] for run in (ours, theirs))
    assert losses[:STEPS] == pytest.approx(expected, abs=OTHER_MESH, rel=0)
    assert [line[3] for line in ours[:STEPS]] == [line[3] for line in theirs]
    assert command.saved_steps(run_dir) == [5, 10, 15, 21, 28, 35, LONGER]
