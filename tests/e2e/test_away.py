"""Data by URL that does not come: a run can be stopped, and loses nothing by it."""

import subprocess
import sys
import time

import numpy as np
import pytest
from data import servers
from e2e import command

from jaxinfra.data import writer
from jaxinfra.data.tokenizer import ByteTokenizer

pytest.importorskip("aiohttp", reason="needs the extra remote")
SHARD_TOKENS = 2_048  # 8 steps of 8 rows of 32 tokens
AWAY = "train-00003.tokens.npy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    content = writer.SplitContent(
        documents=[np.append(rng.integers(0, 99, 127), 256) for _ in range(100)],
        text_bytes=1,
    )
    return writer.write_dataset(
        tmp_path_factory.mktemp("data") / "set",
        tokenizer=ByteTokenizer(),
        splits={"train": content},
        shard_tokens=SHARD_TOKENS,
    ).folder


@pytest.fixture
def server(folder):
    files = {f"set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with servers.Server(files).running() as running:
        yield running


def options(run_dir, path, cache):
    own = {"data.path": path, "data.cache_dir": cache, "data.shuffle": "false"}
    return own | {"run.dir": run_dir, "eval.every": 0, "train.save_every": 100}


@pytest.fixture(scope="module")
def quiet(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("quiet") / "run"
    done = command.train(options(run_dir, folder, run_dir.parent / "cache"))
    assert done.returncode == 0, done.stderr
    return command.history(run_dir)


def start(settings):
    return subprocess.Popen(
        [sys.executable, command.SCRIPT, *command.arguments(settings)],
        env=command.environment(),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_stop_is_met_while_data_are_waited_for(server, quiet, tmp_path):
    settings = options(tmp_path / "run", f"{server.url}/set", tmp_path / "cache")
    server.fault = lambda request: 503 if AWAY in request else None
    process = start(settings)
    while not any(AWAY in r for r in server.requests) or (
        command.steps_done(tmp_path / "run") < 3 * 8 - 2
    ):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    _, text = process.communicate(timeout=command.TIMEOUT_SECS)
    assert process.returncode == 10, text
    done = command.steps_done(tmp_path / "run")
    assert command.saved_steps(tmp_path / "run") == [done]
    [event] = command.events(tmp_path / "run", "preemption")
    assert (event["step"], event["reason"]) == (done, "SIGTERM")
    server.fault = lambda request: None
    again = command.train(settings)
    assert again.returncode == 0, again.stderr
    assert command.history(tmp_path / "run") == quiet


@pytest.mark.slow
def test_data_that_are_gone_end_it_after_a_save(server, quiet, tmp_path):
    settings = options(tmp_path / "run", f"{server.url}/set", tmp_path / "cache")
    gone = server.files.pop(f"set/{AWAY}")
    done = command.train(settings)
    assert done.returncode == 2, done.stderr
    assert f"{AWAY} cannot be read: HTTP 404" in done.stderr
    assert "Traceback" not in done.stderr
    assert command.saved_steps(tmp_path / "run") == [3 * 8]
    server.files[f"set/{AWAY}"] = gone
    again = command.train(settings)
    assert again.returncode == 0, again.stderr
    assert command.history(tmp_path / "run") == quiet
