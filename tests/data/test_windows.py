"""Bytes are checked as they are read: damage ends the run, or its rows are padding."""

import json
import pathlib
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfra.config import DataError
from jaxinfra.data import folders, shards, windows, writer
from jaxinfra.data.batches import make_stream
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.data.windows import LocalWindows

LENGTH, BLOCK = 8, 512


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two shards of a few small blocks each, with a mask."""
    monkeypatch.setattr(windows, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(folders, "BLOCK_BYTES", BLOCK)
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(0, 256, 39), 256) for _ in range(60)]
    masks = [rng.integers(0, 2, 40) for _ in documents]
    content = writer.SplitContent(documents=documents, text_bytes=1, masks=masks)
    return writer.write_dataset(
        tmp_path / "set",
        tokenizer=ByteTokenizer(),
        splits={"train": content},
        shard_tokens=1200,
    ).folder


def flip(path: pathlib.Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def stream_of(folder, **options):
    data = shards.open_dataset(folder, verify=False, **options)
    return data, make_stream(
        data.split("train"), length=LENGTH, batch_size=16, seed=0, shuffle=False
    )


def read_all(stream):
    return [stream.batch(k) for k in range(-(-stream.sources.rows[0].num_rows // 16))]


@settings(deadline=None)
@given(st.integers(1, 50), st.data())
def test_windows_are_slices_with_0_behind_the_end(size, data):
    array = np.arange(1, size + 1, dtype=np.uint16)
    width = data.draw(st.integers(1, 60))
    starts = data.draw(st.lists(st.integers(0, size - 1), max_size=9))
    items, is_damaged = LocalWindows(array).take(np.array(starts, np.int64), width)
    assert is_damaged is None
    for row, start in zip(items, starts, strict=True):
        expected = array[start : start + width].tolist()
        assert row.tolist() == expected + [0] * (width - len(expected))


@pytest.mark.parametrize("kind", ["tokens", "mask"])
def test_every_damaged_byte_stops_the_run_when_its_block_is_read(folder, kind):
    path = folder / f"train-00001.{kind}.npy"
    good = path.read_bytes()
    for place in range(200, len(good), 97):
        flip(path, place)
        _, stream = stream_of(folder)
        with pytest.raises(DataError, match=rf"{kind}.npy is damaged between bytes "):
            read_all(stream)
        path.write_bytes(good)
    read_all(stream_of(folder)[1])


def test_rows_before_the_damage_are_read(folder):
    flip(folder / "train-00001.tokens.npy", -1)
    _, stream = stream_of(folder)
    stream.batch(0)
    with pytest.raises(DataError, match=r"data.damaged=quarantine to go on"):
        stream.batch(18)


def test_quarantine_makes_padding_of_the_rows_there_and_of_no_other(folder):
    _, quiet = stream_of(folder)
    num_rows = quiet.sources.rows[0].num_rows
    run = [quiet.batch(step) for step in range(-(-num_rows // 16))]
    path = folder / "train-00001.tokens.npy"
    flip(path, 3 * BLOCK - 5)
    data, stream = stream_of(folder, damaged="quarantine")
    first = -(-1199 // LENGTH)  # row of the second shard
    header = path.stat().st_size - 2 * 1200
    num_bad = 0
    for step, expected in enumerate(run):
        found = stream.batch(step)
        for b in range(16):
            row = (step * 16 + b) % num_rows
            begin = header + (row - first) * LENGTH * 2
            end = begin + (LENGTH + 1) * 2
            is_bad = row >= first and begin < 3 * BLOCK and end > 2 * BLOCK
            num_bad += is_bad
            want = np.zeros_like(expected.tokens_BT1[b])
            want = want if is_bad else expected.tokens_BT1[b]
            assert found.tokens_BT1[b].tolist() == want.tolist()
            assert found.segments_BT1[b].any() != is_bad
    assert num_bad > 30
    [line] = data.damage
    assert line.endswith(f"{2 * BLOCK} and {3 * BLOCK}; rows there count as padding")


def test_quarantine_is_the_same_after_a_restart_and_on_any_host(folder):
    flip(folder / "train-00000.mask.npy", 700)
    _, stream = stream_of(folder, damaged="quarantine")
    run = [stream.batch(step) for step in range(8)]
    for start in (3, 7):
        _, again = stream_of(folder, damaged="quarantine")
        for step in range(start, 8):
            for half in (slice(0, 8), slice(8, 16)):
                part = again.batch(step, half)
                for field in range(3):
                    np.testing.assert_array_equal(part[field], run[step][field][half])


def test_a_block_is_hashed_once(folder, monkeypatch):
    counts = []
    hashed = windows.xxhash.xxh3_64_intdigest
    monkeypatch.setattr(
        windows.xxhash,
        "xxh3_64_intdigest",
        lambda data: counts.append(1) or hashed(data),
    )
    _, stream = stream_of(folder)
    for step in range(60):
        stream.batch(step)
    sizes = [
        p.stat().st_size for k in ("tokens", "mask") for p in folder.glob(f"*{k}*")
    ]
    assert len(counts) == sum(-(-size // BLOCK) for size in sizes)


def simulate(folder: pathlib.Path, source: pathlib.Path, count: int) -> None:
    """A dataset.json of `count` shards of 10**7 tokens, without their files."""
    manifest = json.loads((source / shards.MANIFEST).read_text())
    train = manifest["splits"]["train"]
    record = train["shards"][0] | {"tokens": 10**7, "documents": 10**4}
    train["shards"] = [
        record | {"file": f"train-{number:05d}.tokens.npy"} for number in range(count)
    ]
    train |= {"tokens": count * 10**7, "documents": count * 10**4}
    folder.mkdir()
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.slow
def test_many_shards_are_opened_when_they_are_read(folder, tmp_path):
    many = tmp_path / "many"
    simulate(many, folder, 100_000)
    tracemalloc.start()
    data = shards.open_dataset(many)
    stream = make_stream(data.split("train"), length=2048, batch_size=64, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.split("train").num_tokens == 10**12
    assert peak < 200 * 2**20
    with pytest.raises(DataError, match=r"sums.npy cannot be read"):
        stream.batch(0)


def test_shards_beyond_what_stays_open_are_opened_again(folder, monkeypatch):
    _, quiet = stream_of(folder)
    monkeypatch.setattr(folders.LocalFolder, "eager_shards", 1)
    monkeypatch.setattr(folders.LocalFolder, "open_shards", 1)
    _, stream = stream_of(folder)
    for step in (0, 18, 1, 17):
        for field in range(3):
            expected = quiet.batch(step)[field]
            np.testing.assert_array_equal(stream.batch(step)[field], expected)


def test_a_folder_may_move_while_it_is_open(folder, tmp_path):
    _, stream = stream_of(folder)
    expected = stream.batch(3).tokens_BT1
    _, stream = stream_of(folder)
    shutil.move(folder, tmp_path / "elsewhere")
    np.testing.assert_array_equal(stream.batch(3).tokens_BT1, expected)
