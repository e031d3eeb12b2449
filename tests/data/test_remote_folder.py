"""A data set behind a URL gives the batches of the same folder on this machine."""

import json
import threading
import time

import numpy as np
import pytest
import servers

from jaxinfra.config import DataError
from jaxinfra.data import folders, remote_file, shards, windows, writer
from jaxinfra.data.batches import make_evaluation, make_stream
from jaxinfra.data.remote_folder import RemoteFolder, _shared
from jaxinfra.data.tokenizer import ByteTokenizer

pytest.importorskip("aiohttp", reason="needs the extra remote")
BLOCK = 500


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Several shards of small blocks, with masks, laid out by best fit."""
    for module in (windows, folders, remote_file):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr("jaxinfra.data.remote_folder.BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote_file.RemoteFile.__init__, "__defaults__", (BLOCK,))
    _shared.cache_clear()
    rng = np.random.default_rng(0)
    documents = [
        np.append(rng.integers(0, 256, n), 256) for n in rng.integers(2, 80, 50)
    ]
    masks = [rng.integers(0, 2, len(d)) for d in documents]
    train = writer.SplitContent(
        documents=documents,
        text_bytes=9,
        masks=masks,
        layout=shards.Layout("best_fit", 16),
    )
    held = writer.SplitContent(documents=documents[:5], text_bytes=9, masks=masks[:5])
    return writer.write_dataset(
        tmp_path / "set",
        tokenizer=ByteTokenizer(),
        splits={"train": train, "held_out": held},
        shard_tokens=700,
    ).folder


@pytest.fixture
def server(folder):
    files = {f"set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with servers.Server(files).running() as running:
        yield running


def opened(server, tmp_path, query="", **options):
    remote = RemoteFolder(f"{server.url}/set{query}", cache_dir=tmp_path / "cache")
    return shards.open_dataset(remote, **options)


def stream_of(data):
    return make_stream(data.split("train"), length=16, batch_size=8, seed=0, block=4)


def equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("query", ["", "?signature=canary"])
def test_batches_are_those_of_the_folder(server, folder, tmp_path, query):
    here, there = shards.open_dataset(folder), opened(server, tmp_path, query)
    assert there.digest == here.digest
    assert "canary" not in str(there.folder)
    ours, theirs = stream_of(there), stream_of(here)
    assert ours.identity() == theirs.identity()
    for step in (0, 1, 2, 30, 10**9):
        equal(ours.batch(step), theirs.batch(step))
        equal(ours.batch(step, slice(2, 5)), theirs.batch(step, slice(2, 5)))
    held = [
        make_evaluation(data.split("held_out"), length=7, batch_size=4)
        for data in (here, there)
    ]
    for step in range(held[0].num_batches):
        equal(held[1].batch(step), held[0].batch(step))


def test_the_second_process_reads_the_cache_alone(server, tmp_path):
    data = opened(server, tmp_path)
    batches = [stream_of(data).batch(step) for step in range(30)]
    while data.files._ahead._num_threads:
        time.sleep(0.01)
    server.requests.clear()
    _shared.cache_clear()
    stream = stream_of(opened(server, tmp_path))
    for step, expected in enumerate(batches):
        equal(stream.batch(step), expected)
    names = {request.split()[1] for request in server.requests}
    assert names == {"/set/dataset.json"}


def test_damage_there_ends_the_run_or_is_padding(server, folder, tmp_path):
    quiet = [stream_of(shards.open_dataset(folder)).batch(k) for k in range(20)]
    name = "set/train-00001.tokens.npy"
    bad = bytearray(server.files[name])
    bad[-3] ^= 1
    server.files[name] = bytes(bad)
    stream = stream_of(opened(server, tmp_path))
    with pytest.raises(DataError, match=r"tokens.npy: block \d+ .* another checksum"):
        [stream.batch(step) for step in range(20)]
    data = opened(server, tmp_path, damaged="quarantine")
    stream = stream_of(data)
    found = [stream.batch(step) for step in range(20)]
    num_bad = sum(
        (f.tokens_BT1 != q.tokens_BT1).any(1).sum()
        for f, q in zip(found, quiet, strict=True)
    )
    assert num_bad > 0
    [line] = data.damage
    assert "rows there count as padding" in line
    bad = shards.verify_dataset(data)
    assert any("train-00001.tokens.npy has checksum" in line for line in bad)


def test_a_wrong_small_file_and_a_folder_without_a_data_set_are_errors(
    server, tmp_path
):
    name = "set/train-00000.ends.npy"
    good = server.files[name]
    server.files[name] = good[:-1]
    with pytest.raises(DataError, match=r"ends.npy came 3 times with another checksum"):
        stream_of(opened(server, tmp_path)).batch(0)
    server.files[name] = good
    manifest = json.loads(server.files.pop("set/dataset.json"))
    with pytest.raises(DataError, match=r"set/dataset.json"):
        opened(server, tmp_path)
    manifest["splits"]["train"]["shards"][0]["documents"] += 1
    manifest["splits"]["train"]["documents"] += 1
    server.files["set/dataset.json"] = json.dumps(manifest).encode()
    with pytest.raises(DataError, match=r"ends.npy holds int64.*dataset.json says"):
        stream_of(opened(server, tmp_path)).batch(0)


def test_servers_that_fail_for_a_while_change_nothing(server, folder, tmp_path):
    expected = stream_of(shards.open_dataset(folder))
    count = 0

    def fault(request):
        nonlocal count
        count += 1
        return (503, "reset", "cut", None, None)[count % 5]

    server.fault = fault
    stream = stream_of(opened(server, tmp_path))
    for step in range(10):
        equal(stream.batch(step), expected.batch(step))


def test_a_cold_start_opens_shards_together(server, folder, tmp_path):
    at_once, most, lock = 0, 0, threading.Lock()

    def slow(request):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1

    server.fault = slow
    equal(
        stream_of(opened(server, tmp_path)).batch(0),
        stream_of(shards.open_dataset(folder)).batch(0),
    )
    assert most > 2
