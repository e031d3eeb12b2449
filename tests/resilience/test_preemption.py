"""Signals become requests inside the block, and are what they were after it."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from jaxinfra.resilience import exitcodes, preemption


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_is_a_request(name):
    former = signal.getsignal(signal.Signals[name])
    with preemption.stop_requests() as request:
        assert request.requested is None
        os.kill(os.getpid(), signal.Signals[name])
        assert request.requested == name
        assert request.requested_secs is not None
    assert signal.getsignal(signal.Signals[name]) == former


def test_the_first_request_counts_and_a_second_sigterm_does_no_harm():
    with preemption.stop_requests() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.requested == "SIGTERM"


def test_a_second_ctrl_c_kills():
    code = (
        "import os, signal\n"
        "from jaxinfra.resilience import preemption\n"
        "with preemption.stop_requests():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGINT


def test_outside_the_main_thread_it_says_why_not():
    errors = []

    def enter():
        try:
            with preemption.stop_requests():
                pass
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main" in errors[0]


def test_codes_are_those_that_supervisors_rely_on():
    names = [name for name in vars(exitcodes) if name.isupper()]
    codes = [getattr(exitcodes, name) for name in names]
    assert codes == [0, 1, 2, 10, 11, 12, 13, 14, 15, 16]
    for name, code in zip(names, codes, strict=True):
        assert f"| {code} | {name} |" in exitcodes.__doc__
    assert [code for code in codes if exitcodes.is_retriable(code)] == [10, 13, 14, 15]
    assert exitcodes.is_retriable(-9)
