"""Rows of text: each token once, after what stands before it."""

import numpy as np
import pytest

from jaxinfra.config import DataError
from jaxinfra.data.char_tokenizer import CharTokenizer
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.generate import rows

START = 99


@pytest.mark.parametrize("stride", [0, 1, 3, 4])
@pytest.mark.parametrize("total", [1, 4, 5, 11, 12])
def test_windows_score_every_token_once_after_the_most_that_fits(total, stride):
    length, document = 4, np.arange(total)
    scored = []
    for row in rows.windows(document, START, length=length, stride=stride):
        assert len(row.ids_T) <= length
        for place, target in zip(row.places_Q, row.targets_Q, strict=True):
            before = START if target == 0 else target - 1
            assert row.ids_T[place] == before
            scored.append(target)
        assert row.places_Q[-1] == len(row.ids_T) - 1
        assert len(row.ids_T) == min(length, scored[-1] + 1)
        assert len(scored) <= length or len(row.targets_Q) <= (stride or length)
    np.testing.assert_array_equal(scored, document)


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils")
    for total, length, stride in [(1, 4, 4), (9, 4, 4), (10, 4, 2), (13, 5, 1)]:
        document = list(range(total))
        theirs = utils.get_rolling_token_windows(
            document, START, max_seq_len=length, context_len=length - stride + 1
        )
        ours = rows.windows(np.array(document), START, length=length, stride=stride)
        for (inputs, targets), row in zip(theirs, ours, strict=True):
            assert inputs == row.ids_T.tolist()
            assert targets == row.targets_Q.tolist()


def test_a_stride_beyond_the_length_is_refused():
    with pytest.raises(DataError, match="stride=5 must be from 1 to length=4"):
        list(rows.windows(np.arange(9), START, length=4, stride=5))


def test_a_context_too_long_loses_its_beginning():
    row = rows.continuation([1, 2, 3, 4], [5, 6], length=3)
    assert row.ids_T.tolist() == [3, 4, 5]
    assert row.places_Q.tolist() == [1, 2]
    assert row.targets_Q.tolist() == [5, 6]
    with pytest.raises(DataError, match="4 tokens does not fit into rows of 3"):
        rows.continuation([1], [2, 3, 4, 5], length=3)
    with pytest.raises(DataError, match="need a token each"):
        rows.continuation([], [2])


def test_spaces_between_context_and_rest_are_read_with_the_rest():
    tokenizer = CharTokenizer("abc ")
    context, following = rows.encode_pair(tokenizer, "ab ", "c")
    assert tokenizer.decode(context) == "ab"
    assert tokenizer.decode(following) == " c"


def test_a_document_begins_as_the_tokenizer_has_it():
    class WithBos(ByteTokenizer):
        bos_id = 7

    plain = ByteTokenizer()
    assert rows.prompt_ids(plain, "a").tolist() == [97]
    assert rows.prompt_ids(plain, "").tolist() == [256]
    assert rows.prompt_ids(WithBos(), "a").tolist() == [7, 97]
    assert rows.prompt_ids(WithBos(), "").tolist() == [7]
    assert rows.start_id(plain) == 256
    for tokenizer, before in ((plain, 256), (WithBos(), 7)):
        context, following = rows.encode_pair(tokenizer, "", "ab")
        assert (context.tolist(), following.tolist()) == ([before], [97, 98])
