import errno
import gzip
import json
import os
import pathlib
import shutil

import dying
import numpy as np
import pytest

from jaxinfra.config import DataError
from jaxinfra.data import (
    cleaning,
    part_files,
    parts,
    prepare,
    shards,
    spans,
    tokenizer_training,
)

OPTIONS = {"tokenizer": "byte", "split": "documents", "held_out": 0.2, "seed": 0}
TEXTS = [f"Document {i}:  the {'same  ' * (i % 7)}words \u00e9\n" for i in range(120)]
PART_BYTES = 1_000


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Files of several kinds, and parts so small that they give several."""
    monkeypatch.setattr(spans, "PART_BYTES", PART_BYTES)
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "a.jsonl", TEXTS)
    (folder / "b.txt").write_text(
        "one|two|Document 3:  the same same same words \u00e9|"
    )
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "packed"}) + "\n")
    return folder


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(corpus, name="set", **options):
    out = corpus.parent / name
    return prepare.prepare([corpus], out, document_separator="|", **OPTIONS | options)


def work(corpus, name="set"):
    return corpus.parent / f".{name}.parts"


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_before_the_writer(corpus, monkeypatch):
    """All parts are there, and no data set."""

    def stop(*args, **options):
        raise DataError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(prepare.writer, "write_dataset", stop)
        with pytest.raises(DataError, match="stopped"):
            run(corpus)
    assert not (corpus.parent / "set").exists()


def noted_writes(monkeypatch):
    """The files of parts that are written from now on."""
    found, real = [], part_files._written

    def written(path, run):
        found.append(path)
        return real(path, run)

    monkeypatch.setattr(part_files, "_written", written)
    return found


def bpe():
    return tokenizer_training.train_bpe(TEXTS, vocab_size=300)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"held_out": 0.0, "shard_tokens": 200},
        {"copies": "exact", "seed": 5},
        {"rules": cleaning.Rules(names=("unicode", "space"), min_chars=25)},
        {"tokenizer": bpe},
    ],
)
def test_parts_give_the_bytes_that_the_texts_in_memory_give(
    corpus, monkeypatch, options
):
    if callable(options.get("tokenizer")):
        pytest.importorskip("tokenizers")
        options = {"tokenizer": bpe()}
    told, told_in_memory, done = [], [], []
    made = run(
        corpus, "parts", **options, tell_taken=told.append,
        tell_done=lambda *sizes: done.append(sizes),
    )  # fmt: skip
    monkeypatch.setattr(spans, "PART_BYTES", 10**9)
    whole = run(corpus, "whole", **options, tell_taken=told_in_memory.append)
    assert bytes_of(made.folder) == bytes_of(whole.folder)
    assert told == told_in_memory
    assert len(done) > 4
    assert done[0] == (0, done[-1][1])
    assert done[-1][0] == done[-1][1]
    assert not work(corpus, "parts").exists()


def test_any_number_of_workers_gives_the_same_bytes(corpus):
    first = run(corpus, "one")
    second = run(corpus, "two", num_workers=2)
    assert bytes_of(first.folder) == bytes_of(second.folder)


def test_finished_parts_are_not_made_again(corpus, monkeypatch):
    stop_before_the_writer(corpus, monkeypatch)
    assert len(list(work(corpus).iterdir())) > 8
    made = noted_writes(monkeypatch)
    dataset = run(corpus)
    assert made == []
    assert dataset.digest == run(corpus, "other").digest


@pytest.mark.parametrize("kind", ["ids", "facts"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "gone"])
def test_a_damaged_part_is_made_again_and_no_other(corpus, monkeypatch, kind, damage):
    expected = run(corpus, "quiet")
    stop_before_the_writer(corpus, monkeypatch)
    bad = sorted(work(corpus).glob(f"*.{kind}"))[2]
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    changed = {"flip": data, "cut": data[:-2], "empty": b"", "longer": data + b"\0\0"}
    bad.unlink()
    if damage in changed:
        bad.write_bytes(changed[damage])
    made = noted_writes(monkeypatch)
    assert bytes_of(run(corpus).folder) == bytes_of(expected.folder)
    assert {path.stem for path in made} == {bad.stem}


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"held_out": 0},
        {"copies": "exact"},
        {"rules": cleaning.Rules(names=("space",))},
        {"rules": cleaning.Rules(max_chars=50)},
        {"tokenizer": bpe},
    ],
)
def test_another_option_uses_no_part_of_before(corpus, monkeypatch, options):
    if callable(options.get("tokenizer")):
        pytest.importorskip("tokenizers")
        options = {"tokenizer": bpe()}
    expected = run(corpus, "quiet", **options)
    stop_before_the_writer(corpus, monkeypatch)
    assert bytes_of(run(corpus, **options).folder) == bytes_of(expected.folder)


def test_a_changed_file_is_read_again_and_the_others_are_not(corpus, monkeypatch):
    write_lines(corpus / "z.jsonl", TEXTS)
    stop_before_the_writer(corpus, monkeypatch)
    before = {path.name for path in work(corpus).iterdir()}
    write_lines(corpus / "z.jsonl", [text.upper() for text in TEXTS])
    stop_before_the_writer(corpus, monkeypatch)
    after = {path.name for path in work(corpus).iterdir()}
    assert before < after
    dataset = run(corpus)
    assert dataset.digest == run(corpus, "other").digest
    assert not work(corpus).exists()


def test_a_worker_that_is_killed_ends_in_an_error_and_the_next_try_goes_on(
    corpus, monkeypatch
):
    expected = run(corpus, "quiet")
    with monkeypatch.context() as patch:
        patch.setattr(parts, "_make", dying.make_and_die)
        with pytest.raises(DataError, match="a worker process was killed"):
            run(corpus, num_workers=2)
    assert not (corpus.parent / "set").exists()
    assert not list(work(corpus).glob(".*.tmp"))
    assert bytes_of(run(corpus, num_workers=2).folder) == bytes_of(expected.folder)


def test_an_error_of_a_worker_is_the_error_of_the_whole(corpus):
    with (corpus / "a.jsonl").open("a") as file:
        file.write("no json\n")
    with pytest.raises(DataError, match=r"a.jsonl:121 is not JSON"):
        run(corpus, num_workers=2)
    assert not (corpus.parent / "set").exists()


def test_a_file_that_goes_away_while_the_parts_are_made_is_an_error(corpus):
    packed = corpus / "c.jsonl.gz"

    def remove(done, total):
        if done:
            packed.unlink(missing_ok=True)

    with pytest.raises(DataError, match=r"c.jsonl.gz cannot be read: No such file"):
        run(corpus, tell_done=remove)
    assert not (corpus.parent / "set").exists()
    assert len(list(work(corpus).glob("*.facts"))) > 3


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_compressed_file_that_is_cut_off_is_an_error(corpus, num_workers):
    packed = corpus / "c.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"c.jsonl.gz cannot be read: damaged or cut"):
        run(corpus, num_workers=num_workers)
    assert not (corpus.parent / "set").exists()


def test_an_empty_file_among_the_others_is_an_error(corpus):
    (corpus / "d.txt").touch()
    with pytest.raises(DataError, match=r"d.txt is empty; remove it from the sources"):
        run(corpus)


def test_texts_of_which_the_rules_leave_nothing_are_an_error(corpus):
    with pytest.raises(DataError, match=r"a.jsonl and 2 more files hold no document"):
        run(corpus, rules=cleaning.Rules(min_chars=10_000))
    assert not (corpus.parent / "set").exists()


def count_fsyncs(corpus, monkeypatch, name):
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", calls.append)
        run(corpus, name)
    return len(calls)


def test_a_disk_that_is_full_at_any_write_leaves_a_whole_data_set_or_none(
    corpus, monkeypatch
):
    num_fsyncs = count_fsyncs(corpus, monkeypatch, "quiet")
    expected = shards.open_dataset(corpus.parent / "quiet").digest
    assert num_fsyncs > 15
    for call in range(1, num_fsyncs + 1):
        calls = 0

        def fsync(descriptor, last=call):
            nonlocal calls
            calls += 1
            if calls == last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        out = corpus.parent / "set"
        shutil.rmtree(work(corpus), ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(DataError, match=r"cannot write .* No space left"):
                run(corpus)
        assert out.exists() == (call == num_fsyncs)
        assert not list(corpus.parent.rglob("*.tmp"))
    assert run(corpus).digest == expected


def test_a_folder_that_may_not_be_written_to_is_an_error(corpus, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(DataError, match=r"cannot write .*set.parts: Read-only file"):
        run(corpus)


def test_text_that_another_process_prepares_first_is_taken_from_it(corpus, monkeypatch):
    cache = {"cache_dir": corpus.parent / "cache", "document_separator": "|", **OPTIONS}
    make_parts = parts.make_parts

    def late(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(parts, "make_parts", make_parts)
            late.first = prepare.prepared(corpus, **cache)
        raise DataError("lost a part")

    monkeypatch.setattr(parts, "make_parts", late)
    folder = prepare.prepared(corpus, **cache)
    assert folder == late.first
    assert shards.open_dataset(folder).split("train").num_documents > 50


def test_documents_are_read_by_number_slice_and_turn(corpus, monkeypatch):
    found = []
    real = parts.make_parts
    monkeypatch.setattr(
        parts, "make_parts", lambda *a, **o: found.append(real(*a, **o)) or found[-1]
    )
    run(corpus)
    [made] = found
    numbers = np.array([100, 3, 122, 0, 50])
    documents = parts.Documents(made, numbers)
    ids = [part.ids_N for part in made]
    lengths = np.concatenate([part.facts_D["tokens"] for part in made])
    every = np.split(np.concatenate(ids), np.cumsum(lengths)[:-1])
    assert len(documents) == 5
    assert documents[-1].tolist() == every[50].tolist()
    assert [d.tolist() for d in documents] == [every[i].tolist() for i in numbers]
    assert [d.tolist() for d in documents[1:3]] == [
        every[3].tolist(),
        every[122].tolist(),
    ]
    with pytest.raises(IndexError):
        documents[5]
