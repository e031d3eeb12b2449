import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfra.config import DataError
from jaxinfra.data import prepare as preparation
from jaxinfra.data import shards, sources

OPTIONS = {"tokenizer": "byte", "split": "documents", "held_out": 0.2, "seed": 0}
GOLDEN = "728853a10de5fabf9052339cf8da7de1148eb1b3dc5ff21e761b5caf9123385b"
TEXTS = [f"document {i}: {'x' * (i * 7 % 23)}\u00e9" for i in range(40)]


def prepare(texts, folder, **options):
    folder.mkdir(exist_ok=True)
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    out = folder / f"out-{len(list(folder.iterdir()))}"
    return preparation.prepare([path], out, **OPTIONS | options)


def documents(dataset, name):
    """Ids of every document of a split, in reading order."""
    found = []
    if name in dataset.splits:
        for shard in dataset.split(name).shards:
            found += np.split(shard.tokens, np.cumsum(shard.lengths)[:-1])
    return found


def texts_of(dataset, name):
    return [dataset.tokenizer.decode(d) for d in documents(dataset, name)]


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_every_document_is_in_exactly_one_split_and_ends_with_eod(tmp_path, tokenizer):
    dataset = prepare(TEXTS, tmp_path, tokenizer=tokenizer, shard_tokens=100)
    train, held = texts_of(dataset, "train"), texts_of(dataset, "held_out")
    assert sorted(train + held) == sorted(TEXTS)
    assert len(held) == 8
    assert held == [t for t in TEXTS if t in held]
    assert train != [t for t in TEXTS if t in train]
    assert len(dataset.split("train").shards) > 3
    for name in ("train", "held_out"):
        for ids in documents(dataset, name):
            assert np.flatnonzero(ids == dataset.tokenizer.eod_id) == [len(ids) - 1]


def test_counts_are_those_of_the_text(tmp_path):
    dataset = prepare(TEXTS, tmp_path)
    for name, split in dataset.splits.items():
        texts = texts_of(dataset, name)
        assert split.num_documents == len(texts)
        assert split.text_bytes == sum(len(t.encode()) for t in texts)
        assert split.num_tokens == split.text_bytes + len(texts)


def test_copies_of_a_text_never_lie_on_both_sides(tmp_path):
    for seed in range(10):
        dataset = prepare(TEXTS * 3, tmp_path, seed=seed)
        train, held = texts_of(dataset, "train"), texts_of(dataset, "held_out")
        assert not set(train) & set(held)
        assert len(train) + len(held) == 3 * len(TEXTS)


def test_which_documents_are_held_out_depends_on_the_seed_only(tmp_path):
    held = [set(texts_of(prepare(TEXTS, tmp_path, seed=s), "held_out")) for s in (0, 1)]
    again = prepare(TEXTS[::-1], tmp_path / "reversed", seed=0)
    assert held[0] != held[1]
    assert set(texts_of(again, "held_out")) == held[0]


def test_the_same_input_gives_the_same_bytes_anywhere(tmp_path):
    first = prepare(TEXTS, tmp_path / "a")
    second = prepare(TEXTS, tmp_path / "b")
    names = sorted(p.name for p in first.folder.iterdir())
    assert names == sorted(p.name for p in second.folder.iterdir())
    assert all(
        (first.folder / n).read_bytes() == (second.folder / n).read_bytes()
        for n in names
    )
    assert prepare(TEXTS, tmp_path / "c", seed=1).digest != first.digest


def test_the_bytes_of_format_3_stay_as_they_are(tmp_path):
    # A change here gives every user's data set and cached text a new digest: raise
    # prepare's version, or the format's.
    dataset = prepare(TEXTS, tmp_path, shard_tokens=300)
    assert dataset.digest == GOLDEN


@pytest.mark.parametrize("held_out", [0.001, 0.999])
def test_both_splits_get_a_document(tmp_path, held_out):
    dataset = prepare(TEXTS, tmp_path, held_out=held_out)
    assert min(s.num_documents for s in dataset.splits.values()) == 1


@pytest.mark.parametrize("split", ["documents", "tail"])
def test_nothing_is_held_out_where_none_is_asked_for(tmp_path, split):
    dataset = prepare(TEXTS, tmp_path, held_out=0, split=split)
    assert list(dataset.splits) == ["train"]
    assert sorted(texts_of(dataset, "train")) == sorted(TEXTS)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.text(st.sampled_from("abc\u00e9\U0001f600"), min_size=1), min_size=1),
    st.floats(0.01, 0.99),
)
def test_tail_holds_out_the_last_characters_and_ends_each_document_once(
    texts, held_out
):
    total = sum(map(len, texts))
    if total < 2:
        return
    train, held = sources.split_tail(
        [sources.Piece(text) for text in texts], held_out=held_out
    )
    cut = total - min(max(round(held_out * total), 1), total - 1)
    assert "".join(p.text for p in train) == "".join(texts)[:cut]
    assert "".join(p.text for p in held) == "".join(texts)[cut:]
    assert all(p.text for p in train + held)
    assert sum(p.is_end for p in train + held) == len(texts)
    assert all(p.is_end for p in train[:-1] + held)


def test_a_document_cut_in_two_has_one_end(tmp_path):
    dataset = prepare(["abcdefgh\u00e9j"], tmp_path, split="tail")
    (train,), (held,) = documents(dataset, "train"), documents(dataset, "held_out")
    assert train.tolist() == list(b"abcdefgh")
    assert held.tolist() == [*"\u00e9j".encode(), 256]


def test_one_document_cannot_be_held_out_from_itself(tmp_path):
    with pytest.raises(DataError, match=r"2 distinct documents .* use data.split=tail"):
        prepare(["same", "same"], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 1.0}, "data.held_out=1.0 must be"),
        ({"held_out": float("nan")}, "data.held_out=nan must be"),
        ({"tokenizer": "word"}, "data.tokenizer='word' is not known"),
        ({"split": "head"}, "data.split='head' is not known"),
        ({"seed": -1}, "seed=-1"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    tmp_path, options, message
):
    with pytest.raises(DataError, match=message):
        prepare(TEXTS, tmp_path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_text_without_a_document_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no document with text"):
        prepare([""], tmp_path)


def test_a_prepared_folder_is_its_own_data_path(tmp_path):
    folder = prepare(TEXTS, tmp_path).folder
    assert preparation.prepared(folder, cache_dir=tmp_path / "c", **OPTIONS) == folder
    assert not (tmp_path / "c").exists()


def test_text_is_prepared_once_into_the_cache_and_again_when_it_changes(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("hello world" * 50)
    options = OPTIONS | {"split": "tail", "cache_dir": tmp_path / "cache"}
    first = preparation.prepared(text, **options)
    made = (first / "dataset.json").stat().st_mtime_ns
    assert preparation.prepared(text, **options) == first
    assert (first / "dataset.json").stat().st_mtime_ns == made
    assert preparation.prepared(text, **options | {"held_out": 0.3}) != first
    text.write_text("hello worlds" * 50)
    assert preparation.prepared(text, **options) != first


def test_the_shipped_corpus_has_a_name_and_can_be_prepared(tmp_path):
    options = OPTIONS | {"split": "tail", "held_out": 0.1, "tokenizer": "char"}
    folder = preparation.prepared("shakespeare", cache_dir=tmp_path, **options)
    dataset = shards.open_dataset(folder)
    text = preparation.CORPORA["shakespeare"].read_text(encoding="utf-8")
    assert len(text) == 1_132_195
    assert texts_of(dataset, "train") + texts_of(dataset, "held_out") == [
        text[:1_018_975],
        text[1_018_975:],
    ]
    assert dataset.tokenizer.vocab_size == 77


def test_a_path_that_does_not_exist_gets_a_suggestion(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    for bad, close in (
        ("shakespear", "shakespeare"),
        (str(tmp_path / "corpos.txt"), "corpus.txt"),
    ):
        with pytest.raises(DataError, match=r"data.path=.* did you mean .*" + close):
            preparation.prepared(pathlib.Path(bad), cache_dir=tmp_path, **OPTIONS)
