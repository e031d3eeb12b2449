"""What each cleaning step takes, and that what is clean stays as it is."""

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfra.config import DataError
from jaxinfra.data import cleaning
from jaxinfra.data.cleaning import Count, Step

WORDS = [f"w{i:03}" for i in range(400)]


def prose(seed=0, words=120):
    """Lines of words that hardly repeat, with stop words."""
    draw = random.Random(seed)
    drawn = [draw.choice(WORDS) for _ in range(words)]
    drawn[::7] = ["the"] * len(drawn[::7])
    drawn[3::11] = ["of"] * len(drawn[3::11])
    return "\n".join(" ".join(drawn[i : i + 10]) for i in range(0, words, 10))


def test_steps_run_in_order_and_count_what_they_take():
    steps = [
        Step("first", lambda text: text.replace("x", "")),
        Step("second", lambda text: text if len(text) > 2 else None),
    ]
    found = cleaning.clean(["axbxc", "xxx", "axb", "plain"], steps)
    assert found == (
        ["abc", "plain"],
        [Count("first", 1, 2 + 3 + 1), Count("second", 1, 2)],
    )
    with pytest.raises(DataError, match="named twice"):
        cleaning.clean([], [steps[0], steps[0]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("\ufeffa\x00b\x1bc\x7f", "abc"),
        ("half \ud800 a pair", "half  a pair"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680"),  # joined, kept
    ],
)
def test_unicode_is_made_normal(text, expected):
    assert cleaning.normal_unicode(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\u00a0b\u3000c", "a b c"),
        ("a  \nb\t\n\n\n\n\nc", "a\nb\n\nc"),
        ("\n\n  indented\n    more\n\n", "  indented\n    more"),
        (" \n \t\n", ""),
    ],
)
def test_space_is_made_plain(text, expected):
    assert cleaning.plain_space(text) == expected


@given(st.text())
def test_what_is_clean_stays(text):
    once = cleaning.plain_space(cleaning.normal_unicode(text))
    assert cleaning.plain_space(cleaning.normal_unicode(once)) == once
    assert unicodedata.is_normalized("NFC", cleaning.normal_unicode(text))


def test_lengths_have_both_limits():
    assert [cleaning.of_length(2, 3)("a" * n) for n in (1, 2, 3, 4)] == [
        None, "aa", "aaa", None,
    ]  # fmt: skip
    assert cleaning.of_length()("") == ""
    for limits in ((-1, 0), (5, 4)):
        with pytest.raises(DataError, match="keep nothing"):
            cleaning.of_length(*limits)


GOOD = prose()
BAD_PROSE = {
    "too few words": " ".join(GOOD.split()[:49]),
    "too many": " ".join(["the of word"] * 33_334),
    "long words": GOOD.replace("w", "w" * 12),
    "short words": " ".join(["a"] * 100 + ["the", "of"]),
    "hashes": GOOD.replace(" w1", " # w1").replace(" w2", " # w2"),
    "ellipses": GOOD.replace(" w1", " w1...").replace(" w2", " w2\u2026"),
    "numbers": GOOD.replace("w1", "").replace("w2", ""),
    "bullets": "\n".join("- " + line for line in GOOD.splitlines()),
    "lines cut off": "\n".join(
        line + ("..." if i % 2 else "") for i, line in enumerate(GOOD.splitlines())
    ),
    "no stop words": GOOD.replace("the", "teh"),
}


def test_prose_passes():
    assert cleaning.gopher_quality(GOOD) == GOOD
    assert cleaning.gopher_repetition(GOOD) == GOOD


@pytest.mark.parametrize("what", BAD_PROSE)
def test_what_is_no_prose_is_left_out(what):
    assert cleaning.gopher_quality(BAD_PROSE[what]) is None


LINES = [prose(seed=i, words=12).replace("\n", " ") for i in range(20)]
REPEATED = {
    "lines": "\n".join(LINES[:10] + ["w001"] * 6),
    "characters of lines": "\n".join([*LINES[:12], *[LINES[0] * 2] * 3]),
    "paragraphs": "\n\n".join([*LINES[:6], *LINES[:4]]),
    "a pair of words": " ".join(f"{w} buy now" for w in WORDS[:60]),
    "a run of ten": " ".join(WORDS[:60] + WORDS[20:35]),
}


@pytest.mark.parametrize("what", REPEATED)
def test_what_repeats_itself_is_left_out(what):
    assert cleaning.gopher_repetition(REPEATED[what]) is None


def test_a_little_repetition_passes():
    for text in ("\n".join([*LINES, LINES[0]]), "one", "", "a a"):
        assert cleaning.gopher_repetition(text) == text


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 6))
def test_repeated_characters_are_those_of_a_plain_count(letters, size):
    spans = [(2 * i, 2 * i + 1) for i in range(len(letters))]
    numbers = [ord(c) for c in letters]
    covered = set()
    for i in range(len(letters) - size + 1):
        run = letters[i : i + size]
        if any(letters[j : j + size] == run for j in range(i)):
            covered |= set(range(i, i + size))
    assert cleaning._repeated_chars(numbers, spans, size) == len(covered)
