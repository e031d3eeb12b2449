"""A wrong command line is refused at once: before jax loads, and nothing is written."""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import time

import pytest
from e2e import command
from wrong_command_lines import WRONG

LIMIT_SECS = 2.0
# What a stub of jax ends the process with, at once: no `except` can hide it.
JAX_WAS_IMPORTED = 99
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore")


class Desk:
    """A folder with configs/ in it and nothing else, where jax must not be loaded."""

    def __init__(self, folder, stubs):
        self.folder = folder
        shutil.copytree(
            command.ROOT / "configs",
            folder / "configs",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for name in HEAVY:
            package = stubs / name / "__init__.py"
            package.parent.mkdir(parents=True)
            package.write_text(f"import os\nos._exit({JAX_WAS_IMPORTED})\n")
        self._environment = command.environment(
            PYTHONPATH=str(stubs), HOME=str(folder), XDG_CACHE_HOME=str(folder / "c")
        )

    def run(self, argv):
        """(what became of the process, seconds)."""
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, command.SCRIPT, *argv],
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, time.monotonic() - started


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"), tmp_path_factory.mktemp("stubs"))


def test_the_stub_catches_jax_in_a_command_line_that_is_right(desk):
    done, _ = desk.run(["--train.steps", "1"])
    assert done.returncode == JAX_WAS_IMPORTED


def test_every_wrong_command_line_exits_2_in_time_without_jax(desk):
    before = command.contents(desk.folder)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(desk.run, [argv for argv, _ in WRONG]))
    for (argv, _), (done, secs) in zip(WRONG, results, strict=True):
        assert done.returncode == 2, (argv, done.stderr)
        assert done.stdout == "", argv
        [line] = done.stderr.splitlines()
        assert line.startswith("error: "), argv
        # Alone, if others took the machine meanwhile.
        assert secs < LIMIT_SECS or desk.run(argv)[1] < LIMIT_SECS, argv
    assert command.contents(desk.folder) == before


def test_help_lists_every_key_without_jax(desk):
    before = command.contents(desk.folder)
    done, _ = desk.run(["--help", "--config", "gpt2_124m"])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in ("--run.dir str", "--train.max_secs float", "gpt2_124m", "50257"):
        assert text in done.stdout
    assert command.contents(desk.folder) == before


def test_what_only_the_devices_tell_exits_2_and_writes_nothing(cache, tmp_path):
    run_dir = tmp_path / "run"
    done = command.train(cache | {"run.dir": run_dir, "mesh.fsdp": 2})
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: mesh.fsdp=2 takes 2 devices of 1")
    assert not run_dir.exists()
