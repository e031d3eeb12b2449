"""One run folder has one live run."""

import signal
import socket

from e2e import command


def test_a_second_job_is_refused_and_changes_nothing(cache, quiet, tmp_path):
    run_dir = tmp_path / "run"
    settings = cache | {"run.dir": run_dir}
    first = command.freeze_when(
        command.start(settings), lambda: command.steps_done(run_dir) >= 3
    )
    before = command.contents(run_dir)
    second = command.train(settings)
    after = command.contents(run_dir)
    code, text = command.end(first, signal.SIGCONT)

    assert second.returncode == 16, second.stderr
    assert second.stderr.startswith("error: ")
    assert "Traceback" not in second.stderr
    assert f"pid {first.pid}" in second.stderr
    assert socket.gethostname() in second.stderr
    assert after == before
    # The first never noticed.
    assert code == 0, text
    assert command.history(run_dir) == command.history(quiet)
