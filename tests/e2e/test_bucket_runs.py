"""A run folder in a bucket of a real server of S3 and GCS: as one on disk, whatever
happens to the server and the job."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import object_stores
import pytest
from e2e import command
from e2e.command import STEPS

from jaxinfra.checkpoint import checking, commits, lifecycle, partial
from jaxinfra.remote import lines, object_path
from jaxinfra.remote.object_path import ObjectPath

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    s3fs = pytest.importorskip("s3fs", reason="makes the bucket")
    with object_stores.s3_server(tmp_path_factory.mktemp("s3")) as server:
        key, secret = object_stores.KEY, object_stores.SECRET
        fs = s3fs.S3FileSystem(key=key, secret=secret, endpoint_url=server.url)
        fs.mkdir("bucket")
        server.environment = {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": server.url,
        }
        server.root = "s3://bucket"
        yield server


@pytest.fixture(scope="module")
def gs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gs")
    with object_stores.gcs_server(folder) as server:
        (folder / "data" / "bucket").mkdir()
        host = server.url.removesuffix("/storage/v1/b")
        server.environment = {"STORAGE_EMULATOR_HOST": host}
        server.root = "gs://bucket"
        yield server


@pytest.fixture(params=["s3", "gs"])
def store(request, monkeypatch):
    return use(request.getfixturevalue(request.param), monkeypatch)


def use(server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def told(run_dir: ObjectPath, name: str = "metrics.jsonl") -> list[dict]:
    return [command.strict_json(line) for line in lines.read_lines(run_dir / name)]


def history(run_dir: ObjectPath) -> list[tuple]:
    keys = ("step", "train/loss", "train/grad_norm", "data/digest")
    return [tuple(line[key] for key in keys) for line in told(run_dir)]


def test_a_run_in_a_bucket_is_killed_and_goes_on_as_one_on_disk(
    store, quiet, cache, tmp_path
):
    run_dir = ObjectPath(f"{store.root}/killed")
    settings = cache | {"run.dir": str(run_dir), "checkpoint.keep": 2}
    job = command.start(settings)
    deadline = time.monotonic() + command.TIMEOUT_SECS
    while not commits.step_folders(commits.place(run_dir / "checkpoints")):
        assert time.monotonic() < deadline
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.02)
    second = command.train(settings)
    assert second.returncode == 16, second.stderr
    assert "which lives" in second.stderr
    job.send_signal(signal.SIGKILL)
    job.communicate()

    done = command.train(settings)
    assert done.returncode == 0, done.stderr
    assert history(run_dir) == command.history(quiet)
    starts = [e["step"] for e in told(run_dir, "events.jsonl") if e["event"] == "start"]
    assert starts[0] == 0
    assert starts[1] > 0
    steps = commits.step_folders(commits.place(run_dir / "checkpoints"))
    assert [step for step, _ in steps] == [STEPS, STEPS - 1]
    assert [checking.validate(path) for _, path in steps] == [[], []]
    for _, path in steps:
        assert object_stores.SECRET not in str((path / "manifest.json").read_text())

    changed = command.train(settings | {"optimizer.learning_rate": 0.1})
    assert changed.returncode == 2
    assert "optimizer.learning_rate" in changed.stderr

    # Copied to a disk, it goes on there.
    local = tmp_path / "run"
    for name in run_dir.below():
        target = local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((run_dir / name).read_bytes())
    more = {"run.dir": local, "train.steps": STEPS + 4}
    done = command.train(settings | more)
    assert done.returncode == 0, done.stderr
    assert command.saved_steps(local)[-1] == STEPS + 4


def test_saves_at_every_step_outlive_a_server_that_is_killed_five_times(
    s3, quiet, cache, monkeypatch
):
    use(s3, monkeypatch)
    run_dir = ObjectPath("s3://bucket/outages")
    settings = cache | {"run.dir": str(run_dir), "train.save_every": 1}
    ended = threading.Event()
    kills = []

    def disturb():
        while not ended.wait(1.5) and len(kills) < 5:
            s3.kill()
            kills.append(time.monotonic())
            time.sleep(1.5)
            s3.start()

    job = command.start(settings | {"checkpoint.keep": 2})
    while not commits.step_folders(commits.place(run_dir / "checkpoints")):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.02)
    thread = threading.Thread(target=disturb)
    thread.start()
    _, text = job.communicate(timeout=command.TIMEOUT_SECS)
    ended.set()
    thread.join()
    assert job.returncode == 0, text
    assert len(kills) == 5, "the run was over before"
    assert history(run_dir) == command.history(quiet)
    assert "CANARY" not in text


def test_saves_complete_though_a_third_of_all_calls_fail(s3, monkeypatch):
    port = int(s3.url.rpartition(":")[2])
    faults = itertools.cycle(["503", "", "reset", "", "", "cut", "", "", ""])
    proxy = object_stores.Proxy(port, faults)
    use(s3, monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    object_path._store.cache_clear()
    saves = lifecycle.Checkpointer(
        "s3://bucket/flaky/checkpoints", keep=2, run_id="r", attempt=1
    )
    values = {f"w{n}": jnp.arange(50_000.0) + n for n in range(8)}
    for step in (1, 2, 3):
        saves.save(step, values, metadata={"config": {}, "data": {}})
        assert [report.step for report in saves.wait()] == [step]
    saves.close()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = partial.restore_part("s3://bucket/flaky/checkpoints", "", sharding=place)
    assert (found.step, found.rejected) == (3, ())
    for name, value in values.items():
        np.testing.assert_array_equal(found.arrays[name], value)
    proxy.listener.close()
    object_path._store.cache_clear()


def test_a_model_in_a_bucket_is_sampled_from_and_begun_from(s3, cache, monkeypatch):
    use(s3, monkeypatch)
    settings = cache | {"train.steps": 2, "train.save_every": 2}
    done = command.train(settings | {"run.dir": "s3://bucket/first"})
    assert done.returncode == 0, done.stderr
    script = command.ROOT / "scripts" / "generate.py"
    words = ["s3://bucket/first", "--prompt", "To be", "--tokens", "4"]
    done = subprocess.run(
        [sys.executable, script, *words],
        env=command.environment(),
        capture_output=True,
        text=True,
        timeout=command.TIMEOUT_SECS,
    )
    assert done.returncode == 0, done.stderr
    begun = {"run.dir": "s3://bucket/second", "init.from": "s3://bucket/first@2"}
    done = command.train(settings | begun)
    assert done.returncode == 0, done.stderr
    assert history(ObjectPath("s3://bucket/second"))[-1][0] == 2


def test_wrong_credentials_are_refused_at_once_without_showing_them(
    s3, cache, monkeypatch
):
    use(s3, monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARYwrongCANARY")
    done = command.train(cache | {"run.dir": "s3://bucket/refused"})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: s3://bucket/refused")
    assert "access is refused; check AWS_ACCESS_KEY_ID" in done.stderr
    assert "CANARY" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in done.stderr
