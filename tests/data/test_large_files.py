"""One large file of any kind: made in parts, by any number of processes, kept after a
kill, in memory that does not grow with it."""

import gzip
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import dying
import pytest
import test_readers
from test_parts import (
    OPTIONS,
    TEXTS,
    bytes_of,
    noted_writes,
    run,
    stop_before_the_writer,
    work,
    write_lines,
)

from jaxinfra.config import DataError
from jaxinfra.data import parts, prepare, spans

ROOT = pathlib.Path(__file__).parents[2]


def one_file(tmp_path, name, texts=TEXTS):
    """A folder with one file, and the data set of its texts, made in memory."""
    for folder in ("corpus", "plain"):
        (tmp_path / folder).mkdir()
    if ".txt" in name:
        texts = [text.strip() for text in texts]
        data = "|".join(texts).encode()
        packed = gzip.compress(data) if name.endswith(".gz") else data
        (tmp_path / "corpus" / name).write_bytes(packed)
    else:
        test_readers.WRITE[name](tmp_path / "corpus" / name, texts)
    write_lines(tmp_path / "plain" / "a.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "PART_BYTES", 10**9)
        expected = run(tmp_path / "plain", "expected")
    return tmp_path / "corpus", expected


@pytest.mark.parametrize(
    ("name", "num_workers"),
    [(name, 1) for name in (*test_readers.WRITE, "a.txt", "a.txt.gz")]
    + [("a.jsonl.gz", 2), ("a.parquet", 2)],
)
def test_one_file_of_any_kind_gives_several_parts_and_the_same_bytes(
    tmp_path, monkeypatch, name, num_workers
):
    monkeypatch.setattr(spans, "PART_BYTES", 300)
    corpus, expected = one_file(tmp_path, name)
    done = []
    stop_before_the_writer(corpus, monkeypatch)
    assert len(list(work(corpus).glob("*.facts"))) > 4
    shutil.rmtree(work(corpus))
    tell = lambda *sizes: done.append(sizes)
    made = run(corpus, num_workers=num_workers, tell_done=tell)
    assert bytes_of(made.folder) == bytes_of(expected.folder)
    assert done == sorted(done)
    assert len(done) > 4
    assert done[-1] == (done[0][1], done[0][1])


@pytest.mark.parametrize("stop_at", [3, 6, 9])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_finished_parts_of_one_file_are_kept(tmp_path, monkeypatch, name, stop_at):
    monkeypatch.setattr(spans, "PART_BYTES", 300)
    corpus, expected = one_file(tmp_path, name)
    calls = itertools.count()

    def stop(done, total):
        if next(calls) == stop_at:
            raise DataError("stopped")

    with pytest.raises(DataError, match="stopped"):
        run(corpus, tell_done=stop)
    kept = {path.stem for path in work(corpus).glob("*.facts")}
    assert len(kept) > stop_at // 4
    made = noted_writes(monkeypatch)
    assert bytes_of(run(corpus).folder) == bytes_of(expected.folder)
    assert made
    assert not kept & {path.stem for path in made}


def test_a_damaged_part_of_a_relayed_file_is_made_again_and_no_other(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(spans, "PART_BYTES", 300)
    corpus, expected = one_file(tmp_path, "a.jsonl.zst")
    stop_before_the_writer(corpus, monkeypatch)
    bad = sorted(work(corpus).glob("*.ids"))[2]
    bad.write_bytes(bad.read_bytes()[:-1])
    made = noted_writes(monkeypatch)
    assert bytes_of(run(corpus).folder) == bytes_of(expected.folder)
    assert {path.stem for path in made} == {bad.stem}


def test_parts_of_a_relayed_file_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "PART_BYTES", 20)
    corpus, expected = one_file(tmp_path, "a.jsonl.gz", [t * 9 for t in TEXTS])
    stop_before_the_writer(corpus, monkeypatch)
    assert 48 < len(list(work(corpus).glob("*.facts"))) < len(TEXTS)
    assert bytes_of(run(corpus).folder) == bytes_of(expected.folder)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.csv"])
def test_an_error_within_one_file_names_its_place(tmp_path, monkeypatch, name):
    monkeypatch.setattr(spans, "PART_BYTES", 300)
    corpus, _ = one_file(tmp_path, name)
    told = f"{name}:51 is not JSON"
    if name == "a.jsonl.gz":
        lines = gzip.decompress((corpus / name).read_bytes()).splitlines()
        data = b"\n".join([*lines[:50], b"[", *lines[50:]])
        (corpus / name).write_bytes(gzip.compress(data))
    elif name == "a.csv":
        with (corpus / name).open("a") as table:
            table.write("one field\n")
        told = f"{name}:{2 * len(TEXTS) + 2} has 1 fields and the first line 2"
    else:
        pq, pa = test_readers.parquet, test_readers.pa
        values = pa.array([*TEXTS[:50], *TEXTS[50:]])
        table = pa.table({"text": values.cast(pa.large_string()).cast(pa.binary())})
        pq.write_table(table, corpus / name, row_group_size=2)
        told = f"{name} row 1 has a bytes under 'text'"
    with pytest.raises(DataError, match=re.escape(told)):
        run(corpus)
    assert not (tmp_path / "set").exists()


def test_a_compressed_file_without_texts_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "PART_BYTES", 10)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n \n" * 99))
    with pytest.raises(DataError, match="more files hold no document with text"):
        prepare.prepare([tmp_path / "a.jsonl.gz"], tmp_path / "set", **OPTIONS)


def test_a_worker_that_is_killed_over_a_relayed_file_ends_in_an_error(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(spans, "PART_BYTES", 300)
    corpus, expected = one_file(tmp_path, "a.jsonl.gz")
    with monkeypatch.context() as patch:
        patch.setattr(parts, "_make_here", dying.die)
        with pytest.raises(DataError, match="a worker process was killed"):
            run(corpus, num_workers=2)
    assert not list(work(corpus).glob(".*.tmp"))
    assert bytes_of(run(corpus).folder) == bytes_of(expected.folder)


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="/proc")
def test_memory_does_not_grow_with_a_compressed_file(tmp_path):
    grown = {}
    for megabytes in (10, 60):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        command = [sys.executable, "tests/data/large_run.py", megabytes, folder]
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        grown[megabytes] = float(done.stdout)
    assert grown[60] < grown[10] + 16, grown
