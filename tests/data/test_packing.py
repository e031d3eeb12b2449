import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfra.config import DataError
from jaxinfra.data import shards
from jaxinfra.data.packing import Rows
from jaxinfra.data.windows import LocalWindows


def naive_rows(split, length):
    """Every row of a split as (tokens, segments), token by token."""
    for shard in split.shards:
        documents = [d for d, n in enumerate(shard.lengths) for _ in range(n)]
        tokens = shard.tokens.tolist()
        for start in range(0, len(tokens) - 1, length):
            row = tokens[start : start + length + 1]
            ids = documents[start : start + length + 1]
            padding = [0] * (length + 1 - len(row))
            yield row + padding, [d - ids[0] + 1 for d in ids] + padding


def split_of(shard_lengths):
    """A split in memory, its tokens 1, 2, 3, ... through all the shards."""
    parts, first = [], 1
    for lengths in shard_lengths:
        tokens = np.arange(first, first + sum(lengths), dtype=np.uint16)
        parts.append(
            shards.Shard(
                arrays=(LocalWindows(tokens),), ends_D=np.cumsum(lengths), checksums={}
            )
        )
        first += sum(lengths)
    return shards.Split(
        name="train",
        digest="none/train",
        folder="none",
        dtype=np.dtype(np.uint16),
        vocab_size=2**16,
        num_tokens=first - 1,
        num_documents=sum(map(len, shard_lengths)),
        text_bytes=0,
        has_mask=False,
        layout=shards.CONCAT,
        shards=tuple(parts),
        tokens_S=np.array([sum(lengths) for lengths in shard_lengths]),
        rows_S=np.zeros(len(shard_lengths), int),
        starts_K=np.array([max(map(len, shard_lengths))]),
    )


SHARD_LENGTHS = st.lists(
    st.lists(st.integers(1, 23), min_size=1, max_size=12), min_size=1, max_size=4
).filter(lambda s: max(map(sum, s)) > 1)


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(SHARD_LENGTHS, st.integers(1, 40), st.data())
def test_rows_in_any_order_equal_rows_cut_token_by_token(lengths, length, data):
    split = split_of(lengths)
    expected = list(naive_rows(split, length))
    packing = Rows(split, length=length)
    assert packing.num_rows == len(expected)
    numbers = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=20))
    batch = packing.gather(np.array(numbers, np.int64))
    tokens, segments = batch.tokens_BT1, batch.segments_BT1
    assert tokens.shape == segments.shape == (len(numbers), length + 1)
    assert tokens.tolist() == [expected[n][0] for n in numbers]
    assert segments.tolist() == [expected[n][1] for n in numbers]


@settings(deadline=None)
@given(SHARD_LENGTHS, st.integers(1, 40))
def test_every_token_but_the_first_of_a_shard_is_a_target_once(lengths, length):
    split = split_of(lengths)
    packing = Rows(split, length=length)
    batch = packing.gather(np.arange(packing.num_rows))
    tokens, segments = batch.tokens_BT1, batch.segments_BT1
    targets = tokens[:, 1:][segments[:, 1:] > 0]
    expected = [t for s in split.shards for t in s.tokens[1:].tolist()]
    assert targets.tolist() == expected


@pytest.mark.parametrize(
    ("length", "dtype"), [(254, np.uint8), (255, np.uint16), (65_535, np.uint32)]
)
def test_cuts_of_one_token_documents_never_wrap(length, dtype):
    split = split_of([[1] * 60_000])
    packing = Rows(split, length=length)
    cuts = packing.gather(np.array([0])).cuts_BC[0]
    width = min(length + 1, 60_000)
    assert cuts.dtype == dtype
    assert cuts[0] == width
    assert cuts[1:width].tolist() == list(range(1, width))
    assert (cuts[width:] == length + 1).all()


def test_tokens_keep_the_dtype_of_the_split(make_split):
    packing = Rows(make_split([5, 9]), length=4)
    assert packing.gather(np.array([1])).tokens_BT1.dtype == np.uint16


@pytest.mark.parametrize("rows", [[-2], [0, 4]])
def test_a_row_that_does_not_exist_is_an_error(make_split, rows):
    packing = Rows(make_split([5, 9]), length=4)
    assert packing.num_rows == 4
    with pytest.raises(IndexError, match=r"-1 .. 3"):
        packing.gather(np.array(rows))


def test_a_split_without_a_token_to_predict_is_an_error(make_split):
    with pytest.raises(DataError, match="has 1 tokens, too few"):
        Rows(make_split([1]), length=4)


def test_a_row_length_below_one_is_an_error(make_split):
    with pytest.raises(DataError, match=r"train.length=0"):
        Rows(make_split([9]), length=0)
