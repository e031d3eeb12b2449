"""Documents made clean before they are tokenized: steps, and counts of what each took.

A step makes a document of a document, or None of one that is to be left out. Steps are
pure and know nothing of each other; `clean` runs them in order and counts. The quality
and repetition rules are those of Gopher: Rae et al. 2021, arXiv:2112.11446, appendix
A.1.1. They were made for English web pages: code, poems and lists fail them.
"""

import collections
import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from jaxinfra.config import DataError

Change = Callable[[str], str | None]

# Characters of no text: controls but tab and newline, marks of byte order, surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
_WIDE_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LINE_TAILS = re.compile("[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile("\n{3,}")
_WORD = re.compile(r"\S+")
_STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
_ELLIPSES = ("...", "\u2026")
_BULLETS = ("\u2022", "\u2023", "\u25b6", "\u25cf", "- ", "* ")
# Words of a run -> the most of a document's characters that its most frequent run may
# cover; and that all runs that come again may.
_TOP_RUNS = {2: 0.20, 3: 0.18, 4: 0.16}
_REPEATED_RUNS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Which steps documents go through, as plain values: those of `CHANGES` in the
    order of their names, then their length in characters, where 0 is no limit."""

    names: tuple[str, ...] = ()
    min_chars: int = 0
    max_chars: int = 0


NO_RULES = Rules()


@dataclasses.dataclass(frozen=True)
class Step:
    """A named change of every document."""

    name: str
    change: Change


@dataclasses.dataclass(frozen=True)
class Count:
    """What a step took: whole documents, and characters, theirs included."""

    name: str
    documents: int
    characters: int


def steps(rules: Rules) -> list[Step]:
    """The steps of the rules. Raises DataError for a step that is not known or named
    twice, and for limits that keep nothing."""
    for number, name in enumerate(rules.names):
        if name not in CHANGES:
            raise DataError(f"the cleaning step {name!r} is none of {[*CHANGES]}")
        if name in rules.names[:number]:
            raise DataError("a cleaning step is named twice; give each once")
    found = [Step(name, CHANGES[name]) for name in rules.names]
    if rules.min_chars or rules.max_chars:
        found.append(Step("length", of_length(rules.min_chars, rules.max_chars)))
    return found


def clean(
    documents: Iterable[str], steps: Sequence[Step]
) -> tuple[list[str], list[Count]]:
    """(what is left, in order; what each step took).

    A document that a step leaves empty is left out by it.
    """
    left: list[str] = []
    taken = {step.name: [0, 0] for step in steps}
    if len(taken) != len(steps):
        raise DataError("a cleaning step is named twice; give each once")
    for document in documents:
        text: str | None = document
        for step in steps:
            before = len(text)
            text = step.change(text) or None
            count = taken[step.name]
            count[1] += before - len(text or "")
            if text is None:
                count[0] += 1
                break
        if text:
            left.append(text)
    return left, [Count(name, *count) for name, count in taken.items()]


def normal_unicode(text: str) -> str:
    """NFC, newlines for every kind of line end, without control characters."""
    text = _LINE_ENDS.sub("\n", unicodedata.normalize("NFC", text))
    return _CONTROLS.sub("", text)


def plain_space(text: str) -> str:
    """Plain spaces for wide ones, none at line ends, at most one blank line in a row,
    none around the document. Space that begins a line stays, as code needs it."""
    text = _LINE_TAILS.sub("", _WIDE_SPACES.sub(" ", text))
    return _BLANK_LINES.sub("\n\n", text).strip("\n").rstrip()


def of_length(min_chars: int = 0, max_chars: int = 0) -> Change:
    """Keeps documents of so many characters; 0 is no limit."""
    if min_chars < 0 or max_chars < 0 or 0 < max_chars < min_chars:
        raise DataError(
            f"min_chars={min_chars} and max_chars={max_chars} keep nothing; give 0 for "
            "no limit, and no minimum above the maximum"
        )

    def change(text: str) -> str | None:
        is_kept = min_chars <= len(text) and not 0 < max_chars < len(text)
        return text if is_kept else None

    return change


def gopher_quality(text: str) -> str | None:
    """Keeps what reads as prose: 50 to 100,000 words of 3 to 10 characters in the mean,
    80% of them with a letter, two stop words at least; at most one # or ellipsis in ten
    words, 90% of lines that begin with a bullet, 30% that end with an ellipsis."""
    words = text.split()
    if not 50 <= len(words) <= 100_000:
        return None
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return None
    for symbols in (("#",), _ELLIPSES):
        if sum(map(text.count, symbols)) > 0.1 * len(words):
            return None
    if sum(any(c.isalpha() for c in word) for word in words) < 0.8 * len(words):
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
        return None
    if sum(line.endswith(_ELLIPSES) for line in lines) > 0.3 * len(lines):
        return None
    return text if len(_STOP_WORDS & {word.lower() for word in words}) >= 2 else None


def gopher_repetition(text: str) -> str | None:
    """Keeps what does not say the same again and again: lines and paragraphs (30% of
    them at most, and 20% of the characters), runs of 2 to 10 words."""
    lines = [line for line in text.splitlines() if line.strip()]
    paragraphs = [part for part in re.split("\n\n+", text.strip()) if part.strip()]
    for parts in (lines, paragraphs):
        seen: set[str] = set()
        again = [part for part in parts if part in seen or seen.add(part)]
        if len(again) > 0.3 * len(parts):
            return None
        if sum(map(len, again)) > 0.2 * len(text):
            return None
    spans = [match.span() for match in _WORD.finditer(text)]
    words = [text[start:end] for start, end in spans]
    ids: dict[str, int] = {}
    numbers = [ids.setdefault(word, len(ids)) for word in words]
    for size, most in _TOP_RUNS.items():
        counts = collections.Counter(_runs(numbers, size))
        [(run, count)] = counts.most_common(1) or [((), 1)]
        if count > 1:
            names = {number: word for word, number in ids.items()}
            chars = sum(len(names[number]) for number in run)
            if count * chars > most * len(text):
                return None
    for size, most in _REPEATED_RUNS.items():
        if _repeated_chars(numbers, spans, size) > most * len(text):
            return None
    return text


def _runs(numbers: Sequence[int], size: int) -> Iterable[tuple[int, ...]]:
    return zip(*(itertools.islice(numbers, i, None) for i in range(size)), strict=False)


def _repeated_chars(
    numbers: Sequence[int], spans: Sequence[tuple[int, int]], size: int
) -> int:
    """Characters of words in runs that have come before, each counted once."""
    seen: set[tuple[int, ...]] = set()
    total, counted = 0, 0  # words before `counted` are in the total, or were passed by
    for first, run in enumerate(_runs(numbers, size)):
        if run in seen:
            for start, end in spans[max(first, counted) : first + size]:
                total += end - start
            counted = first + size
        seen.add(run)
    return total


# By name, for command lines; `length` has its own options.
CHANGES: dict[str, Change] = {
    "unicode": normal_unicode,
    "space": plain_space,
    "gopher_quality": gopher_quality,
    "gopher_repetition": gopher_repetition,
}
