"""Mixtures, ramps and orders in closed form."""

import collections
import fractions

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfra.config import ConfigError, DataError
from jaxinfra.data import writer
from jaxinfra.data.batches import make_stream
from jaxinfra.data.mixture import Mixture
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.stages import BatchSizes, Stage, parse

WEIGHT = st.integers(0, 1000).map(lambda n: fractions.Fraction(n, 1000))
STAGES = st.lists(
    st.lists(WEIGHT, min_size=3, max_size=3).filter(any), min_size=1, max_size=4
)


def mixture_of(stages, every=7, batch_size=5):
    weights = {
        name: [Stage(every * s, stage[j]) for s, stage in enumerate(stages)]
        for j, name in enumerate("abc")
    }
    return Mixture(dict.fromkeys("abc", 9), weights, BatchSizes(batch_size))


@settings(deadline=None)
@given(STAGES, st.integers(1, 9), st.integers(1, 9))
def test_each_set_gives_its_rows_in_turn_and_in_its_share(stages, every, batch_size):
    mixture = mixture_of(stages, every, batch_size)
    set_B, turn_B = mixture.locate(np.arange(500))
    for number in range(3):
        mine = turn_B[set_B == number]
        assert mine.tolist() == list(range(len(mine)))
    for s, stage in enumerate(stages):
        stop = 500 if s == len(stages) - 1 else (s + 1) * every * batch_size
        here = set_B[s * every * batch_size : stop]
        for number, weight in enumerate(stage):
            expected = weight / sum(stage) * len(here)
            assert abs((here == number).sum() - expected) <= 3


@settings(deadline=None)
@given(STAGES, st.integers(0, 10**12))
def test_rows_far_away_are_those_of_the_same_sequence(stages, start):
    mixture = mixture_of(stages)
    far = np.arange(start, start + 50)
    set_B, turn_B = mixture.locate(far)
    alone = [mixture.locate(far[b : b + 1]) for b in range(50)]
    assert set_B.tolist() == [int(s[0]) for s, _ in alone]
    assert turn_B.tolist() == [int(t[0]) for _, t in alone]
    for number in range(3):
        mine = turn_B[set_B == number]
        assert (np.diff(mine) == 1).all()


def test_shares_are_exact_at_a_distance():
    mixture = mixture_of([[fractions.Fraction(p, 10) for p in (7, 2, 1)]])
    _, turn_B = mixture.locate(np.arange(10**11, 10**11 + 20))
    set_B, _ = mixture.locate(np.arange(10**11, 10**11 + 20))
    counts = [int(turn_B[set_B == number][0]) for number in range(3)]
    for count, share in zip(counts, (0.7, 0.2, 0.1), strict=True):
        assert abs(count - share * 10**11) <= 3


def test_without_weights_sets_are_read_by_their_numbers_of_rows():
    mixture = Mixture({"a": 30, "b": 10}, None, BatchSizes(4))
    set_B, turn_B = mixture.locate(np.arange(40))
    assert collections.Counter(set_B.tolist()) == {0: 30, 1: 10}
    assert turn_B[set_B == 1].tolist() == list(range(10))


def test_a_ramp_counts_rows_in_closed_form():
    sizes = BatchSizes(16, "4 8@10 16@25")
    counted = [sizes.of(step) for step in range(100)]
    assert counted == [4] * 10 + [8] * 15 + [16] * 75
    assert [sizes.rows_before(k) for k in range(100)] == [
        sum(counted[:k]) for k in range(100)
    ]
    assert sizes.rows_before(10**12) == 160 + 16 * (10**12 - 25)


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ("8@5 16@9", "'8@5' is not as in '8 16@200'"),
        ("8 16", "'16' is not as in"),
        ("8 12@9 16@9", "'16@9' is not as in .* steps must rise"),
        ("8 x@9", "'x@9' is not as in"),
        ("-8 16@9", "'-8' is not as in"),
        ("1/2 16@9", "'1/2' is not as in"),
        ("0 16@9", "must be of whole rows from 1"),
        ("1.5 16@9", "must be of whole rows from 1"),
        ("8 32@9", "ends with 32 rows and train.batch_size=16; set train.batch_size"),
        (" , ", "train.batch_ramp is empty"),
    ],
)
def test_stages_that_are_none_are_refused(ramp, message):
    with pytest.raises(ConfigError, match=message):
        BatchSizes(16, ramp)


def test_weights_without_a_set_or_all_0_are_refused():
    sizes = BatchSizes(4)
    with pytest.raises(ConfigError, match="give each set a weight, or none at all"):
        Mixture({"a": 3, "b": 3}, {"a": parse("1", key="a")}, sizes)
    weights = {"a": parse("1 0@5", key="a"), "b": parse("1 0@7", key="b")}
    with pytest.raises(ConfigError, match="a, b are all 0 from step 7"):
        Mixture({"a": 3, "b": 3}, weights, sizes)


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    ramp=st.sampled_from(["", "2 4@3 8@9", "4 8@1"]),
    block=st.sampled_from([0, 1, 3]),
    shuffle=st.booleans(),
    num_hosts=st.sampled_from([1, 2]),
)
def test_a_step_is_the_same_however_it_is_asked_for(
    make_stream_of, weights, ramp, block, shuffle, num_hosts
):
    options = {"ramp": ramp, "block": block, "shuffle": shuffle, "weights": weights}
    stream = make_stream_of(**options)
    for step in (0, 2, 3, 8, 9, 200, 10**9):
        whole = make_stream_of(**options).batch(step)
        size = stream.sizes.of(step)
        parts = np.split(np.arange(size), num_hosts)
        found = [stream.batch(step, positions) for positions in parts]
        for field in range(2):
            joined = np.concatenate([part[field] for part in found])
            np.testing.assert_array_equal(joined, whole[field])


@pytest.fixture(scope="module")
def make_stream_of(tmp_path_factory):
    splits = {}
    for name, lengths in {"a": [5, 9, 14, 6] * 4, "b": [3] * 20, "c": [40]}.items():
        documents = [np.full(n, ord(name)) for n in lengths]
        splits[name] = writer.write_dataset(
            tmp_path_factory.mktemp("mixture") / name,
            tokenizer=ByteTokenizer(),
            splits={"train": writer.SplitContent(documents=documents, text_bytes=1)},
            shard_tokens=60,
        ).split("train")

    def make(*, weights, **options):
        named = dict(zip("abc", weights, strict=True))
        stages = {name: (Stage(0, weight),) for name, weight in named.items()}
        return make_stream(
            splits, length=6, batch_size=8, seed=3, weights=stages, **options
        )

    make.splits = splits
    return make


def test_rows_come_from_the_sets_by_weight(make_stream_of):
    stream = make_stream_of(weights=[5, 2, 1])
    tokens = np.concatenate([stream.batch(k).tokens_BT1[:, 0] for k in range(100)])
    counts = collections.Counter(map(chr, tokens.tolist()))
    assert counts == {"a": 500, "b": 200, "c": 100}
    _, row_B = stream.order.locate(np.arange(800))
    set_B, _ = stream.order.locate(np.arange(800))
    for number, rows in enumerate(stream.sources.rows):
        epochs = row_B[set_B == number]
        first = epochs[: rows.num_rows]
        assert sorted(first.tolist()) == list(range(rows.num_rows))


def test_identities_tell_mixtures_ramps_and_blocks_apart(make_stream_of):
    streams = [
        make_stream_of(weights=[5, 2, 1]),
        make_stream_of(weights=[5, 2, 2]),
        make_stream_of(weights=[5, 2, 1], ramp="4 8@2"),
        make_stream_of(weights=[5, 2, 1], block=2),
    ]
    identities = [stream.identity() for stream in streams]
    assert all(identities.count(i) == 1 for i in identities)


def test_a_set_without_a_row_is_an_error_before_the_first_step(
    make_stream_of, make_split
):
    splits = make_stream_of.splits | {"d": make_split([1])}
    with pytest.raises(DataError, match="has 1 tokens, too few for one row"):
        make_stream(splits, length=6, batch_size=8, seed=0)
