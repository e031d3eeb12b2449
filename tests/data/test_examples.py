"""Batches of labelled examples: each once a pass, in an order that a step gives."""

import numpy as np
import pytest

from jaxinfra.config import DataError
from jaxinfra.data import examples

SIZE, BATCH = 23, 5


def make_stream(**changed):
    inputs = np.arange(SIZE * 6, dtype=np.uint8).reshape(SIZE, 2, 3)
    settings = {"batch_size": BATCH, "seed": 7} | changed
    return examples.make_stream(inputs, np.arange(SIZE, dtype=np.int32), **settings)


def labels(stream, steps):
    return np.concatenate([stream.batch(k).labels for k in range(steps)])


def test_every_example_comes_once_a_pass_in_another_order_each_time():
    seen = labels(make_stream(), 2 * SIZE)  # 10 passes
    passes = seen[: 10 * SIZE].reshape(10, SIZE)
    assert (np.sort(passes) == np.arange(SIZE)).all()
    assert len({tuple(order) for order in passes}) == 10
    assert tuple(labels(make_stream(seed=8), 4)) != tuple(seen[:20])
    assert (labels(make_stream(shuffle=False), 5)[:SIZE] == np.arange(SIZE)).all()


def test_positions_of_a_batch_are_rows_of_the_whole():
    stream = make_stream()
    whole, part = stream.batch(6), stream.batch(6, np.array([1, 4]))
    for array, rows in zip(whole, part, strict=True):
        np.testing.assert_array_equal(array[[1, 4]], rows)
        assert array.dtype == rows.dtype
    np.testing.assert_array_equal(whole.rows_B, np.arange(BATCH))
    assert (whole.weights_B == 1).all()
    np.testing.assert_array_equal(whole.inputs[:, 0, 0], whole.labels * 6)


def test_an_evaluation_reads_every_example_once_and_fills_up_without_weight():
    held = make_stream().held
    rows = examples.make_evaluation(held.inputs, held.labels, batch_size=BATCH)
    batches = [rows.batch(k) for k in range(rows.num_batches)]
    weights = np.concatenate([batch.weights_B for batch in batches])
    seen = np.concatenate([batch.labels for batch in batches])
    assert rows.num_batches == 5
    np.testing.assert_array_equal(weights, np.arange(25) < SIZE)
    np.testing.assert_array_equal(seen[weights == 1], np.arange(SIZE))
    assert not batches[-1].inputs[SIZE % BATCH :].any()
    with pytest.raises(IndexError):
        rows.batch(5)


def test_the_identity_tells_another_value_order_or_shape():
    first, held = make_stream().identity(), make_stream().held
    other = held.inputs.copy()
    other[3, 1, 2] ^= 1
    flat = held.inputs.reshape(SIZE, 6)
    settings = {"batch_size": BATCH, "seed": 7}
    changed = [
        make_stream(seed=8).identity(),
        make_stream(shuffle=False).identity(),
        make_stream(batch_size=4).identity(),
        examples.make_stream(other, held.labels, **settings).identity(),
        examples.make_stream(flat, held.labels, **settings).identity(),
    ]
    assert make_stream().identity() == first
    assert all(identity != first for identity in changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "train.batch_size=0 must be 1 or more"),
        ({"seed": -1}, "run.seed=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(changed, message):
    with pytest.raises(DataError, match=message):
        make_stream(**changed)


def test_inputs_without_labels_are_refused():
    with pytest.raises(DataError, match="3 inputs and 2 labels"):
        examples.make_evaluation(np.zeros((3, 1)), np.zeros(2), batch_size=1)
