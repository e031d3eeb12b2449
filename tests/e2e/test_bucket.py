"""Training on a bucket of a real server: cold cache, an outage, wrong credentials."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from data import hadoop, object_stores
from e2e import command

from jaxinfra.data import prepare as preparation

pytestmark = pytest.mark.slow
SCRIPT = command.SCRIPT
SECRET = "canary-of-a-secret-key"
STEPS = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of some blocks, in two shards."""
    root = tmp_path_factory.mktemp("texts")
    file = root / "a.jsonl"
    text = pathlib.Path(preparation.CORPORA["shakespeare"]).read_text()
    chunks = [text[i : i + 3_000] for i in range(0, len(text), 3_000)]
    lines = [json.dumps({"text": f"{n} {c}"}) for n in range(4) for c in chunks]
    file.write_text("\n".join(lines))
    return preparation.prepare(
        [file], root / "set", tokenizer="byte", split="documents", held_out=0.02,
        seed=0, shard_tokens=3_000_000,
    ).folder  # fmt: skip


SERVERS = {
    "s3": object_stores.s3_server,
    "gs": object_stores.gcs_server,
    "webhdfs": hadoop.hdfs_server,
}


@pytest.fixture(scope="module", params=sorted(SERVERS))
def bucket(request, folder, tmp_path_factory):
    """(server, environment, URL of the data set)."""
    scheme, root, environment = request.param, "bucket", {}
    reason = "needs the extra remote"
    with SERVERS[scheme](tmp_path_factory.mktemp(scheme)) as server:
        match scheme:
            case "s3":
                environment = {
                    "AWS_ACCESS_KEY_ID": object_stores.KEY,
                    "AWS_SECRET_ACCESS_KEY": object_stores.SECRET,
                    "AWS_ENDPOINT_URL": server.url,
                    "AWS_DEFAULT_REGION": "us-east-1",
                }
                fs = pytest.importorskip("s3fs", reason=reason).S3FileSystem(
                    key=object_stores.KEY,
                    secret=object_stores.SECRET,
                    endpoint_url=server.url,
                )
            case "gs":
                host = server.url.removesuffix("/storage/v1/b")
                environment = {"STORAGE_EMULATOR_HOST": host}
                gcsfs = pytest.importorskip("gcsfs.core", reason=reason)
                fs = gcsfs.GCSFileSystem(
                    token="anon", project="test", endpoint_url=host
                )
            case "webhdfs":
                root, (name, port) = f"{server.host}/bucket", server.host.split(":")
                fsspec = pytest.importorskip("fsspec", reason=reason)
                fs = fsspec.filesystem(scheme, host=name, port=int(port), user="test")
        top = "/bucket" if scheme == "webhdfs" else "bucket"
        fs.mkdir(top)
        for path in folder.iterdir():
            fs.pipe_file(f"{top}/sets/{path.name}", path.read_bytes())
        yield server, environment, f"{scheme}://{root}/sets"


def settings(run_dir, path, cache):
    return {
        "run.dir": run_dir,
        "data.path": path,
        "data.cache_dir": cache,
        "data.shuffle_block": 256,
        "train.steps": STEPS,
        "train.save_every": STEPS,
        "eval.every": 0,
        "eval.batches": 1,
    }


def start(options, environment):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *command.arguments(options)],
        env=command.environment(**environment),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("local") / "run"
    done = command.train(settings(run_dir, folder, run_dir.parent / "cache"))
    assert done.returncode == 0, done.stderr
    return command.history(run_dir)


def test_an_outage_of_twenty_seconds_changes_no_digest(bucket, local, tmp_path):
    server, environment, url = bucket
    run_dir = tmp_path / "run"
    process = start(settings(run_dir, url, tmp_path / "cache"), environment)
    while command.steps_done(run_dir) < 20:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    server.kill()
    time.sleep(20)
    server.start()
    _, text = process.communicate(timeout=command.TIMEOUT_SECS)
    assert process.returncode == 0, text
    assert command.history(run_dir) == local


def test_a_warm_cache_needs_the_server_for_a_moment_alone(bucket, local, tmp_path):
    _, environment, url = bucket
    cache = tmp_path / "cache"
    for name in ("cold", "warm"):
        run_dir = tmp_path / name
        process = start(settings(run_dir, url, cache), environment)
        _, text = process.communicate(timeout=command.TIMEOUT_SECS)
        assert process.returncode == 0, text
        assert command.history(run_dir) == local
    assert (cache / "blocks").is_dir()


def test_wrong_credentials_end_it_before_the_first_step(bucket, tmp_path):
    _, environment, url = bucket
    if "AWS_SECRET_ACCESS_KEY" not in environment:
        pytest.skip("the emulator of GCS takes all credentials")
    wrong = environment | {"AWS_SECRET_ACCESS_KEY": SECRET}
    run_dir = tmp_path / "run"
    process = start(settings(run_dir, url, tmp_path / "cache"), wrong)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "access is refused" in text
    assert SECRET not in text
    assert "Traceback" not in text
    assert not run_dir.exists()
    found = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert all(SECRET.encode() not in p.read_bytes() for p in found)


def test_a_bucket_that_is_not_there_ends_it_too(bucket, tmp_path):
    _, environment, url = bucket
    missing = url.replace("sets", "none")
    process = start(settings(tmp_path / "run", missing, tmp_path / "c"), environment)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "none/dataset.json" in text
    assert os.listdir(tmp_path) in ([], ["c"])
