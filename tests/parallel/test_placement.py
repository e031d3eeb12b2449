"""Where layers are: every repeat in one chunk, in order, and home again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfra.parallel import placement


@st.composite
def any_placement(draw):
    stages, virtual = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    repeats = draw(st.integers(stages * virtual, 40))
    sizes = {
        "size": draw(st.integers(1, 3)),
        "prefix": draw(st.integers(0, 4)),
        "suffix": draw(st.integers(0, 4)),
    }
    placed = placement.place(repeats, stages=stages, virtual=virtual, **sizes)
    return repeats, stages, virtual, sizes, placed


@given(any_placement())
def test_chunks_are_runs_of_repeats_in_layer_order(drawn):
    repeats, _, _, _, placed = drawn
    firsts, counts = placed.first.ravel(), placed.count.ravel()
    assert firsts[0] == 0
    np.testing.assert_array_equal(firsts[1:], np.cumsum(counts)[:-1])
    assert counts.sum() == repeats
    assert counts.min() >= 1
    assert counts.max() == placed.depth


@given(any_placement())
def test_no_chunk_could_give_a_repeat_to_another_and_be_better(drawn):
    _, _, _, sizes, placed = drawn
    counts = placed.count.ravel()
    layers = counts * sizes["size"]
    layers[0] += sizes["prefix"]
    layers[-1] += sizes["suffix"]
    for load, count in zip(layers, counts, strict=True):
        if count > 1:
            assert load - sizes["size"] <= layers.min()


@given(any_placement())
def test_repeats_travel_to_their_chunks_and_back(drawn):
    """Plays the rounds on numbered rows."""
    repeats, stages, virtual, _, placed = drawn
    rest = np.full((stages, placed.at_rest), -1)
    rest.ravel()[:repeats] = np.arange(repeats)
    chunks = rest.copy()
    block = placed.block
    if placed.rounds:
        chunks = np.full((stages, placed.rows), -1)
        back = np.full_like(rest, -1)
        for pairs, send, put in placed.rounds:
            assert (
                len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
            )
            for source, target in pairs:
                a, b = send[source] * block, put[target] * block
                chunks[target, b : b + block] = rest[source, a : a + block]
                back[source, a : a + block] = chunks[target, b : b + block]
        np.testing.assert_array_equal(back, rest)
    for v in range(virtual):
        for s in range(stages):
            row, count = v * placed.depth, placed.count[v, s]
            expected = placed.first[v, s] + np.arange(count)
            np.testing.assert_array_equal(chunks[s, row : row + count], expected)


@pytest.mark.parametrize(("repeats", "stages"), [(8, 4), (80, 8), (5, 2)])
def test_nothing_travels_where_repeats_are_at_home(repeats, stages):
    assert placement.place(repeats, stages=stages, virtual=1).rounds == ()


def test_too_few_repeats_are_refused():
    with pytest.raises(ValueError, match="3 repeats do not give each of 2 stages x 2"):
        placement.place(3, stages=2, virtual=2)
