"""Copies that are planted are found, and nothing else is."""

import random

import pytest

from jaxinfra.config import DataError
from jaxinfra.data import duplicates, prepare

datasketch = pytest.importorskip("datasketch")


def speeches(count, words=200):
    """Passages of the shipped text, no two alike."""
    text = prepare.CORPORA["shakespeare"].read_text().split()
    return [" ".join(text[i * words : (i + 1) * words]) for i in range(count)]


def changed(text, draw, share):
    """The text with a share of its words, at one place, replaced."""
    words = text.split()
    num = round(share * len(words))
    at = draw.randrange(len(words) - num)
    words[at : at + num] = [f"other{draw.randrange(10**6)}" for _ in range(num)]
    return " ".join(words)


def test_copies_are_equal_but_for_space():
    texts = ["a b", "c", "a  b\n", "A b", "c", "", " "]
    assert duplicates.without_copies(texts) == [0, 1, 3, 5]


def test_near_copies_of_nine_tenths_are_found_and_nothing_else():
    draw, texts = random.Random(0), speeches(600)
    planted = [changed(text, draw, 0.1) for text in texts[::3]]
    kept = duplicates.without_near_copies([*texts, *planted])
    removed = set(range(len(texts) + len(planted))) - set(kept)
    right = sum(number >= len(texts) for number in removed)
    assert right >= 0.95 * len(planted)
    assert right >= 0.99 * len(removed)


def test_below_the_threshold_nothing_is_taken_for_a_copy():
    draw, texts = random.Random(1), speeches(200)
    planted = [changed(text, draw, 0.3) for text in texts]  # about half of the runs
    assert len(duplicates.without_near_copies([*texts, *planted])) == 400
    lower = duplicates.without_near_copies([*texts, *planted], threshold=0.4)
    assert len(lower) <= 210


def test_the_first_is_kept_and_the_same_whatever_is_asked_again():
    text, other = speeches(2)
    texts = [other, text, changed(text, random.Random(2), 0.05), text, "", "!", "!"]
    kept = duplicates.without_near_copies(texts)
    assert kept == [0, 1, 4, 5]
    assert duplicates.without_near_copies(texts) == kept


def test_case_and_punctuation_make_no_difference():
    [text] = speeches(1)
    texts = [text, text.upper().replace(",", " ;")]
    assert duplicates.without_near_copies(texts, threshold=1) == [0]
    with pytest.raises(DataError, match="near_threshold=0 must be"):
        duplicates.without_near_copies(texts, threshold=0)
