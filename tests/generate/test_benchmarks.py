"""Figures from scores that are known: the arithmetic, and files that are refused."""

import json
import math

import numpy as np
import pytest

from jaxinfra.config import DataError
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.generate import benchmarks
from jaxinfra.generate.benchmarks import Answer, Choice, Document
from jaxinfra.generate.rows import Scored

TOKENIZER = ByteTokenizer()


def by_target(table):
    """A scorer whose log-likelihood of a byte depends on that byte alone."""

    def score(asked):
        return [
            Scored(
                np.array([table.get(chr(t), -1.0) for t in row.targets_Q], np.float32),
                np.zeros(len(row.targets_Q), bool),
            )
            for row in asked
        ]

    return score


def test_perplexity_counts_every_token_once():
    texts = [Document(TOKENIZER.encode(text)) for text in ("aab", "a" * 9)]
    found = benchmarks.perplexity(
        texts, TOKENIZER, by_target({"b": -3.0}), num_bytes=24, length=4, stride=2
    )
    nats = 11 * 1.0 + 3.0
    assert found["tokens"] == 12
    assert found["documents"] == 2
    assert found["nats_per_token"] == pytest.approx(nats / 12)
    assert found["perplexity"] == pytest.approx(math.exp(nats / 12))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 24)
    with pytest.raises(DataError, match="no token"):
        benchmarks.perplexity([], TOKENIZER, by_target({}), num_bytes=0, length=4)


def test_tokens_that_do_not_count_are_not_scored():
    ids_N = TOKENIZER.encode("babab")
    counts_N = np.array([0, 0, 1, 0, 1], np.uint8)
    texts = [Document(ids_N, counts_N), Document(ids_N, 0 * counts_N)]
    score = by_target({"b": -3.0})
    for length in (2, 16):
        found = benchmarks.perplexity(
            texts, TOKENIZER, score, num_bytes=10, length=length
        )
        assert (found["tokens"], found["targets"]) == (10, 2)
        assert found["nats_per_token"] == 3.0
        assert "bits_per_byte" not in found


def test_the_likeliest_choice_is_taken_with_and_without_regard_to_length():
    items = [
        Choice("q", ("xx", "yyyy"), 1),  # -2 - 1 against -2 - 1: the first of equals
        Choice("q", ("x", "bbbb"), 0),
    ]
    score = by_target({"x": -1.0, "y": -0.5, "b": -3.0})
    found = benchmarks.multiple_choice(items, TOKENIZER, score, length=0)
    # By bytes, with the space's -1: -3 / 2 against -3 / 4, -2 / 1 against -13 / 4.
    assert (found["n"], found["accuracy"]) == (2, 0.5)
    assert found["accuracy_by_bytes"] == 1.0
    assert found["accuracy_stderr"] == pytest.approx(0.5)
    assert found["accuracy_by_bytes_stderr"] == 0.0


def test_an_answer_is_right_whatever_space_is_around_it():
    items = [
        Answer("1+1=", ("2", "two"), ("\n",)),
        Answer("1+2=", ("3",), ("\n", "!")),
        Answer("", ("x",), ("\n",)),
    ]

    def complete(prompts, until):
        assert [p.tolist() for p in prompts][2] == [TOKENIZER.eod_id]
        assert until[1] == ("\n", "!")
        return [" two ", "4", "x"]

    found = benchmarks.exact_match(items, TOKENIZER, complete)
    assert (found["n"], found["exact_match"]) == (3, pytest.approx(2 / 3))
    assert found["exact_match_stderr"] == pytest.approx(math.sqrt(2 / 9 / 2))


def write(path, *values):
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


def test_task_files_are_read(tmp_path):
    choice = {"choices": ["a", "b"], "answer": 1}
    items = benchmarks.read(
        write(tmp_path / "a", {"question": "q", **choice}, {"context": "c", **choice})
    )
    assert items == [Choice("q", ("a", "b"), 1), Choice("c", ("a", "b"), 1)]
    items = benchmarks.read(
        write(
            tmp_path / "b",
            {"prompt": "p", "answer": "x"},
            {"prompt": "p", "answer": ["x", "y"], "until": ["."], "id": 4},
        )
    )
    assert items == [Answer("p", ("x",), ("\n",)), Answer("p", ("x", "y"), (".",))]


GOOD = {"question": "q", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    "bad",
    [
        [],
        {"question": "q"},
        GOOD | {"answer": 2},
        GOOD | {"answer": True},
        GOOD | {"answer": "1"},
        GOOD | {"choices": ["a"]},
        GOOD | {"choices": ["a", ""]},
        {"choices": ["a", "b"], "answer": 0},
        {"prompt": "p", "answer": []},
        {"prompt": "p", "answer": "a", "until": 3},
    ],
    ids=json.dumps,
)
def test_a_bad_line_is_refused_by_its_place(tmp_path, bad):
    with pytest.raises(DataError, match=r'tasks:2 must be {"question"'):
        benchmarks.read(write(tmp_path / "tasks", GOOD, bad))


def test_a_bad_file_is_refused(tmp_path):
    mixed = write(tmp_path / "tasks", GOOD, {"prompt": "p", "answer": "a"})
    with pytest.raises(DataError, match="tasks:2 is of another kind"):
        benchmarks.read(mixed)
    with pytest.raises(DataError, match="cannot be read"):
        benchmarks.read(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="has no line"):
        benchmarks.read(tmp_path / "empty")
    (tmp_path / "half").write_text('{"question": ')
    with pytest.raises(DataError, match="half:1 is not JSON"):
        benchmarks.read(tmp_path / "half")
