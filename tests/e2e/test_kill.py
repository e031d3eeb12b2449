"""kill -9 at any moment costs time and nothing else."""

import signal

import pytest
from e2e import command
from e2e.command import STEPS


def _moments(run_dir):
    """Name -> whether the run is there, in the order in which it is killed there."""

    def is_at(step):
        return lambda: command.steps_done(run_dir) >= step

    def is_saving():  # in this attempt: a killed save leaves its folder
        attempt = command.events(run_dir, "start")[-1]["attempt"]
        return any(f".{attempt}.writing" in str(p) for p in command.writing(run_dir))

    return {
        "before step 1": is_at(0),
        "at step 3": is_at(3),
        "at step 13": is_at(13),
        "during a save": is_saving,
        "at step 27": is_at(27),
    }


@pytest.mark.slow
def test_a_run_killed_five_times_equals_a_quiet_one(cache, quiet, tmp_path):
    run_dir = tmp_path / "run"
    settings = cache | {"run.dir": run_dir}
    undone, seen = [], []
    for number, (moment, is_there) in enumerate(_moments(run_dir).items(), start=1):
        process = command.freeze_when(
            command.start(settings),
            lambda number=number, is_there=is_there: (
                len(command.events(run_dir, "start")) == number and is_there()
            ),
        )
        code, _ = command.end(process, signal.SIGKILL)
        assert code == -signal.SIGKILL, moment
        begun = command.events(run_dir, "start")[-1]
        # What this start took back is what the last kill left beyond the save.
        taken = [line for line in seen if line["step"] > begun["step"]]
        assert begun["undone_steps"] == len(taken), moment
        undone += taken
        seen = command.metrics(run_dir)
        assert [line["step"] for line in seen] == list(range(1, len(seen) + 1)), moment
        if moment == "before step 1":
            assert not seen
        if moment == "during a save":
            assert command.writing(run_dir)
        assert len(seen) < STEPS, f"{moment}: the run had ended"
    done = command.train(settings)
    assert done.returncode == 0, done.stderr

    last_start = command.events(run_dir, "start")[-1]["step"]
    undone += [line for line in seen if line["step"] > last_start]
    assert command.lines(run_dir / "metrics.lost.jsonl") == undone
    assert undone
    assert command.history(run_dir) == command.history(quiet)
    assert [line["step"] for line in command.metrics(run_dir)] == [*range(1, STEPS + 1)]
    assert command.saved_steps(run_dir)[-1] == STEPS
    assert not list(run_dir.glob("checkpoints/*.writing"))
    held_out = [
        [line.get("eval/held_out/loss") for line in command.metrics(folder)]
        for folder in (run_dir, quiet)
    ]
    assert held_out[0] == held_out[1]


def test_the_same_command_after_the_end_changes_no_step(cache, quiet, tmp_path):
    run_dir = command.copy_as_of(STEPS, quiet, tmp_path / "run")
    done = command.train(cache | {"run.dir": run_dir})
    assert done.returncode == 0, done.stderr
    assert command.metrics(run_dir) == command.metrics(quiet)
    assert command.saved_steps(run_dir) == command.saved_steps(quiet)


@pytest.mark.slow
def test_a_run_killed_at_every_third_step_equals_a_quiet_one(cache, quiet, tmp_path):
    run_dir = tmp_path / "run"
    settings = cache | {"run.dir": run_dir, "train.save_every": 2}
    for step in range(1, STEPS - 3, 3):
        moment = lambda step=step: command.steps_done(run_dir) >= step
        process = command.freeze_when(command.start(settings), moment)
        assert command.end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    done = command.train(settings)
    assert done.returncode == 0, done.stderr
    assert command.history(run_dir) == command.history(quiet)
