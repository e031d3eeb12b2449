"""A run that is asked to stop saves where it stands and says so: exit 10."""

import signal

from e2e import command
from e2e.command import STEPS


def _stopped_at(run_dir) -> int:
    """The step a run stopped at, once all its records agree about it."""
    event = command.events(run_dir, "preemption")[-1]
    assert command.metrics(run_dir)[-1]["step"] == event["step"]
    assert command.saved_steps(run_dir)[-1] == event["step"]
    assert command.events(run_dir, "end")[-1]["code"] == 10
    return event["step"]


def test_sigterm_sigint_and_max_secs_stop_after_a_committed_save(
    cache, quiet, tmp_path
):
    run_dir = tmp_path / "run"
    settings = cache | {"run.dir": run_dir}
    stops = [0]
    for number, step in ((signal.SIGTERM, 6), (signal.SIGINT, 16)):
        process = command.freeze_when(
            command.start(settings),
            lambda step=step: command.steps_done(run_dir) >= step,
        )
        code, text = command.end(process, number)
        assert code == 10, text
        assert "Traceback" not in text
        reason = command.events(run_dir, "preemption")[-1]["reason"]
        assert reason == signal.Signals(number).name
        stops.append(_stopped_at(run_dir))

    done = command.train(settings | {"train.max_secs": 0.01})
    assert done.returncode == 10, done.stderr
    assert command.events(run_dir, "preemption")[-1]["reason"] == "train.max_secs"
    stops.append(_stopped_at(run_dir))
    assert sorted(set(stops)) == stops, "every start made progress"
    assert stops[-1] < STEPS

    done = command.train(settings)
    assert done.returncode == 0, done.stderr
    # A stop loses nothing: no step was made twice.
    assert not (run_dir / "metrics.lost.jsonl").exists()
    starts = [event["step"] for event in command.events(run_dir, "start")]
    assert starts == stops
    assert command.history(run_dir) == command.history(quiet)
