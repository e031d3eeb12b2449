"""Rows laid out at prepare time: every token a target once, documents kept apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfra.config import DataError
from jaxinfra.data import fitting, shards, writer
from jaxinfra.data.batches import make_evaluation, make_stream
from jaxinfra.data.packing import Rows
from jaxinfra.data.tokenizer import ByteTokenizer

PACKINGS = sorted(fitting.PACKINGS)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def laid_out(lengths, name, length):
    """(document of each token, plan)."""
    plan = fitting.plan(np.array(lengths), name=name, length=length)
    order = [d for unit in plan.units for d in unit]
    assert sorted(order) == list(range(len(lengths)))
    return np.repeat(order, np.array(lengths)[order]), plan


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20), st.sampled_from(PACKINGS))
def test_every_token_but_the_first_of_a_document_is_a_target_once(
    lengths, length, name
):
    document_N, plan = laid_out(lengths, name, length)
    num_targets = np.zeros(len(document_N), int)
    for start, stop in plan.rows_R2:
        assert 2 <= stop - start <= length + 1
        num_targets[start + 1 : stop] += 1
    is_first_N = np.diff(document_N, prepend=-1) != 0
    assert (num_targets[~is_first_N] == 1).all()
    assert (num_targets[is_first_N] <= 1).all()


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20), st.sampled_from(PACKINGS))
def test_a_document_that_fits_is_in_one_row(lengths, length, name):
    document_N, plan = laid_out(lengths, name, length)
    for start, stop in plan.rows_R2:
        for document in set(document_N[start:stop].tolist()):
            if lengths[document] <= length + 1:
                here = document_N[start:stop] == document
                assert here.sum() == lengths[document]


def naive_bins(sizes, room, *, best):
    """Room left in the bins that first fit or best fit opens, the slow way."""
    left = []
    for size in sorted(sizes, reverse=True) if best else sizes:
        fits = [b for b, free in enumerate(left) if free >= size]
        if fits:
            chosen = min(fits, key=lambda b: left[b]) if best else fits[0]
            left[chosen] -= size
        else:
            left.append(room - size)
    return sorted(left)


@settings(deadline=None)
@given(st.lists(st.integers(2, 17), min_size=1, max_size=60), st.booleans())
def test_fits_are_those_of_the_textbook(lengths, best):
    _, plan = laid_out(lengths, "best_fit" if best else "first_fit", 16)
    left = 17 - (plan.rows_R2[:, 1] - plan.rows_R2[:, 0])
    assert sorted(left.tolist()) == naive_bins(lengths, 17, best=best)


def test_padding_falls_from_one_document_a_row_to_the_best_fit():
    lengths = np.random.default_rng(0).lognormal(4, 1, 2_000).astype(np.int64) + 2
    padding = {
        name: fitting.padding_fraction(
            fitting.plan(lengths, name=name, length=256).rows_R2, length=256
        )
        for name in PACKINGS
    }
    assert padding["best_fit"] <= padding["first_fit"] < 0.02
    assert padding["documents"] > 0.4


@pytest.fixture(params=PACKINGS)
def data(request, tmp_path):
    """A data set laid out for rows of 8, in several shards, with a held-out split."""
    rng = np.random.default_rng(1)
    documents = [
        np.append(rng.integers(1, 256, n), 256) for n in rng.integers(1, 30, 40)
    ]
    layout = shards.Layout(request.param, 8)
    train = writer.SplitContent(documents=documents, text_bytes=1, layout=layout)
    held = writer.SplitContent(documents=documents[:5], text_bytes=1)
    return writer.write_dataset(
        tmp_path / "set",
        tokenizer=ByteTokenizer(),
        splits={"train": train, "held_out": held},
        shard_tokens=150,
    )


def test_rows_are_read_as_they_were_laid_out(data):
    split = data.split("train")
    rows = Rows(split, length=8)
    assert len(split.shards) > 2
    assert rows.num_rows == sum(len(shard.rows) for shard in split.shards)
    batch = rows.gather(np.arange(rows.num_rows))
    r = 0
    for shard in split.shards:
        document_N = np.repeat(np.arange(len(shard.lengths)), shard.lengths)
        for start, stop in shard.rows:
            size = stop - start
            assert batch.tokens_BT1[r, :size].tolist() == list(shard.tokens[start:stop])
            assert not batch.tokens_BT1[r, size:].any()
            segments = document_N[start:stop] - document_N[start] + 1
            assert batch.segments_BT1[r, :size].tolist() == segments.tolist()
            assert not batch.segments_BT1[r, size:].any()
            r += 1


def test_another_row_length_is_refused_and_evaluation_reads_any(data):
    with pytest.raises(DataError, match=r"rows of 8 tokens, and train.length=9"):
        make_stream(data.split("train"), length=9, batch_size=2, seed=0)
    evaluation = make_evaluation(data.split("held_out"), length=5, batch_size=2)
    assert evaluation.batch(0).tokens_BT1.shape == (2, 6)
    assert make_evaluation(data.split("train"), length=5, batch_size=2).num_batches


def test_the_folder_opens_with_numpy_and_the_identity_names_the_layout(data):
    layout = data.split("train").layout
    stream = make_stream(data.split("train"), length=8, batch_size=2, seed=0)
    assert stream.identity()["packing"] == f"{layout.name}-1"
    rows = np.load(data.folder / "train-00000.rows.npy")
    assert rows.dtype == np.int64
    assert rows[0, 0] == 0
    assert not (data.folder / "held_out-00000.rows.npy").exists()
