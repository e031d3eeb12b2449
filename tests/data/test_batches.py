import numpy as np
import pytest

from jaxinfra.config import ConfigError, DataError
from jaxinfra.data.batches import make_evaluation, make_stream
from jaxinfra.data.packing import Rows

LENGTHS = [7, 31, 3, 19, 64, 1, 11, 40, 25]


@pytest.fixture
def split(make_split):
    return make_split(LENGTHS, shard_tokens=70)


def equal(a, b):
    """Of tokens and cuts."""
    return all(np.array_equal(x, y) for x, y in zip(a[:2], b[:2], strict=True))


def rows_of(stream, count):
    return stream.order.locate(np.arange(count))[1]


def test_an_epoch_reads_every_row_once_and_epochs_differ(split):
    stream = make_stream(split, length=6, batch_size=4, seed=1)
    num_rows = stream.sources.rows[0].num_rows
    epochs = rows_of(stream, 3 * num_rows).reshape(3, num_rows)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_rows), (3, 1)))
    assert len({e.tobytes() for e in epochs}) == 3


def test_batches_are_the_rows_in_the_order_of_the_global_row(split):
    stream = make_stream(split, length=6, batch_size=4, seed=1)
    rows = rows_of(stream, 40)
    expected = Rows(split, length=6).gather(rows)
    for step in range(10):
        here = slice(4 * step, 4 * step + 4)
        assert equal(stream.batch(step), [x[here] for x in expected[:2]])


def test_without_shuffle_rows_come_in_reading_order_again_and_again(split):
    stream = make_stream(split, length=6, batch_size=4, seed=1, shuffle=False)
    num_rows = stream.sources.rows[0].num_rows
    rows = rows_of(stream, 2 * num_rows)
    assert rows.tolist() == [*range(num_rows), *range(num_rows)]


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_together_read_what_one_host_reads(split, num_hosts):
    stream = make_stream(split, length=6, batch_size=8, seed=1)
    for step in (0, 3, 1000):
        parts = [
            make_stream(split, length=6, batch_size=8, seed=1).batch(step, positions)
            for positions in np.split(np.arange(8), num_hosts)
        ]
        together = [np.concatenate([part[i] for part in parts]) for i in range(2)]
        assert equal(together, stream.batch(step))


def test_a_restart_at_any_step_goes_on_with_the_same_batches(split):
    stream = make_stream(split, length=6, batch_size=4, seed=1)
    run = [stream.batch(step) for step in range(30)]
    for start in (0, 1, 13, 29):
        again = make_stream(split, length=6, batch_size=4, seed=1)
        assert all(equal(again.batch(s), run[s]) for s in range(start, 30))


def test_positions_may_be_a_slice(split):
    stream = make_stream(split, length=6, batch_size=4, seed=1)
    whole = stream.batch(5)
    assert equal(stream.batch(5, slice(1, 3)), [x[1:3] for x in whole[:2]])
    assert stream.batch(5, slice(0, 0)).tokens_BT1.shape == (0, 7)


def test_a_step_far_away_is_read_like_the_first(split):
    stream = make_stream(split, length=6, batch_size=4, seed=1)
    assert stream.batch(10**12).tokens_BT1.shape == (4, 7)


def test_identity_changes_with_everything_that_changes_a_batch(split, make_split):
    kwargs = {"length": 6, "batch_size": 4, "seed": 1}
    streams = [
        make_stream(split, **kwargs),
        make_stream(split, **kwargs | {"seed": 2}),
        make_stream(split, **kwargs | {"length": 5}),
        make_stream(split, **kwargs | {"batch_size": 8}),
        make_stream(split, **kwargs, shuffle=False),
        make_stream(make_split(LENGTHS), **kwargs),
    ]
    identities = [s.identity() for s in streams]
    assert all(identities.count(i) == 1 for i in identities)
    assert make_stream(split, **kwargs).identity() == identities[0]
    assert {type(v) for v in identities[0].values()} == {int, str}


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_evaluation_reads_every_row_once_and_pads_the_last_batch(split, batch_size):
    evaluation = make_evaluation(split, length=6, batch_size=batch_size)
    batches = [evaluation.batch(k) for k in range(evaluation.num_batches)]
    assert all(b.tokens_BT1.shape == (batch_size, 7) for b in batches)
    tokens, cuts = (np.concatenate([b[i] for b in batches]) for i in range(2))
    num_rows = evaluation.rows.num_rows
    assert equal(
        (tokens[:num_rows], cuts[:num_rows]),
        evaluation.rows.gather(np.arange(num_rows)),
    )
    assert not tokens[num_rows:].any()
    assert not cuts[num_rows:, 0].any()
    assert len(tokens) - num_rows < batch_size


def test_hosts_may_read_only_padding_of_the_last_evaluation_batch(split):
    evaluation = make_evaluation(split, length=6, batch_size=1000)
    assert not evaluation.batch(0, slice(990, 1000)).segments_BT1.any()
    with pytest.raises(IndexError, match="batch 1 "):
        evaluation.batch(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "train.batch_size=0"),
        ({"length": 0}, "train.length=0"),
        ({"seed": -1}, "run.seed=-1"),
    ],
)
def test_numbers_out_of_range_are_errors_that_name_the_key(split, change, message):
    with pytest.raises((ConfigError, DataError), match=message):
        make_stream(split, **({"length": 6, "batch_size": 4, "seed": 1} | change))
