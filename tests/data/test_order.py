import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfra.data import order

SEEDS = st.integers(0, 2**64 - 1)
# Of chi-square from its mean, in standard deviations; with fixed seeds a pass stays.
MAX_SIGMAS = 4.0


def sigmas(counts, expected):
    chi2 = ((counts - expected) ** 2 / expected).sum()
    degrees = counts.size - 1
    return (chi2 - degrees) / math.sqrt(2 * degrees)


@settings(deadline=None)
@given(st.integers(1, 3000), SEEDS, st.integers(0, 2**63))
def test_every_index_has_its_own_place(size, seed, epoch):
    place = order.permute(np.arange(size), size=size, seed=seed, epoch=epoch)
    assert place.dtype == np.uint64
    assert np.array_equal(np.sort(place), np.arange(size))


@settings(deadline=None)
@given(st.integers(1, 2**48), SEEDS, st.data())
def test_places_in_huge_sizes_are_inside_and_distinct(size, seed, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), max_size=50, unique=True))
    place = order.permute(np.array(indices, np.uint64), size=size, seed=seed, epoch=1)
    assert len(set(place.tolist())) == len(indices)
    assert all(p < size for p in place.tolist())


def test_a_vector_of_epochs_equals_one_epoch_at_a_time():
    index, epochs = np.arange(300) % 17, np.arange(300) // 17
    together = order.permute(index, size=17, seed=3, epoch=epochs)
    alone = [
        order.permute(np.array([i]), size=17, seed=3, epoch=int(e))[0]
        for i, e in zip(index, epochs, strict=True)
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_all_orders_of_a_few_points_come_up_evenly(size):
    epochs = 5 * 5040
    place = order.permute(
        np.tile(np.arange(size), epochs),
        size=size,
        seed=7,
        epoch=np.repeat(np.arange(epochs), size),
    ).reshape(epochs, size)
    codes = (place.astype(int) * size ** np.arange(size)).sum(axis=1)
    all_codes = sorted(
        sum(p * size**i for i, p in enumerate(places))
        for places in itertools.permutations(range(size))
    )
    counts = np.bincount(np.searchsorted(all_codes, codes), minlength=len(all_codes))
    assert abs(sigmas(counts, epochs / len(all_codes))) < MAX_SIGMAS


@pytest.mark.parametrize("size", [64, 1024, 99_991])
@pytest.mark.parametrize("distance", [1, 33])
def test_two_rows_lie_anywhere_from_each_other_over_the_epochs(size, distance):
    epochs = np.arange(20_000)
    first, second = (
        order.permute(np.full(epochs.size, i), size=size, seed=1, epoch=epochs)
        for i in (5, 5 + distance)
    )
    gap = (second.astype(int) - first.astype(int)) % size  # 1 .. size - 1, all alike
    counts = np.bincount((gap - 1) * 9 // (size - 1), minlength=9)
    edges = -(-np.arange(10) * (size - 1) // 9)
    assert abs(sigmas(counts, np.diff(edges) * epochs.size / (size - 1))) < MAX_SIGMAS


def test_no_two_seeds_and_epochs_share_an_order():
    index, epochs = np.tile(np.arange(50), 12), np.repeat(np.arange(12), 50)
    orders = [
        place.tobytes()
        for seed in (*range(12), 2**63, 2**64 - 1)
        for place in order.permute(index, size=50, seed=seed, epoch=epochs).reshape(
            12, 50
        )
    ]
    assert len(set(orders)) == len(orders) == 14 * 12


def test_the_numbers_of_version_1_stay_as_they_are():
    place = order.permute(np.arange(8), size=1000, seed=42, epoch=3)
    assert order.VERSION == 1
    assert place.tolist() == [764, 523, 380, 17, 255, 87, 250, 754]


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"size": 2**48 + 1}, {"seed": -1}, {"seed": 2**64}, {"size": 3}],
)
def test_numbers_out_of_range_are_errors(change):
    with pytest.raises(ValueError, match=r"must be in (0|1) \.\."):
        order.permute(np.arange(4), **({"size": 9, "seed": 0, "epoch": 0} | change))
