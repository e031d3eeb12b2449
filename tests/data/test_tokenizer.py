import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfra.config import DataError
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data.char_tokenizer import CharTokenizer
from jaxinfra.data.tokenizer import ByteTokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS)
def test_bytes_are_the_utf8_bytes_and_decode_back(text):
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(text.encode())
    assert ByteTokenizer().decode(ids) == text


@given(TEXTS.filter(len))
def test_characters_have_ids_in_sorted_order_and_decode_back(text):
    coder = CharTokenizer(text)
    ids = coder.encode(text)
    assert ids.tolist() == [sorted(set(text)).index(c) for c in text]
    assert coder.decode(ids) == text
    assert coder.vocab_size == len(set(text)) + 1


@pytest.mark.parametrize("coder", [ByteTokenizer(), CharTokenizer("ab\U0001f600")])
def test_end_of_document_is_the_last_id_and_decodes_to_nothing(coder):
    assert coder.eod_id == coder.vocab_size - 1
    ids = np.concatenate([coder.encode("ab"), [coder.eod_id], coder.encode("b")])
    assert coder.decode(ids) == "abb"
    assert coder.decode(np.array([coder.eod_id])) == ""
    assert coder.decode(np.array([], np.uint16)) == ""


def test_bytes_that_are_not_utf8_decode_to_replacement_characters():
    assert ByteTokenizer().decode(np.array([97, 0xC3])) == "a\ufffd"


def test_bytes_on_two_sides_of_an_end_of_document_make_no_character():
    assert ByteTokenizer().decode(np.array([0xC3, 256, 0xA9])) == "\ufffd\ufffd"


@pytest.mark.parametrize("coder", [ByteTokenizer(), CharTokenizer("xyz\u00e9")])
def test_json_gives_an_equal_tokenizer_with_the_same_digest(coder):
    again = tokenizers.from_json(coder.to_json())
    assert again == coder
    assert again.digest() == coder.digest()


def test_another_alphabet_has_another_digest():
    digests = {c.digest() for c in (ByteTokenizer(), *map(CharTokenizer, ("a", "b")))}
    assert len(digests) == 3


def test_a_vocabulary_above_65536_gets_uint32_ids():
    characters = "".join(map(chr, range(0x10000, 0x10000 + 2**16)))
    ids = CharTokenizer(characters).encode(characters[-1])
    assert ids.dtype == np.uint32
    assert ids.tolist() == [2**16 - 1]


def test_an_unknown_character_is_named_with_its_position():
    with pytest.raises(DataError, match=r"character 'c' at position 2 .* byte token"):
        CharTokenizer("ab").encode("abc")


def test_half_a_surrogate_pair_is_an_error():
    with pytest.raises(DataError, match=r"character 1 .* surrogate"):
        ByteTokenizer().encode("a\ud800")


@pytest.mark.parametrize("coder", [ByteTokenizer(), CharTokenizer("ab")])
@pytest.mark.parametrize("bad", [-1, 999])
def test_an_id_outside_the_vocabulary_is_an_error(coder, bad):
    with pytest.raises(DataError, match=f"id {bad} is outside 0.."):
        coder.decode(np.array([0, bad]))


@pytest.mark.parametrize(
    "value",
    [
        {"name": "word"},
        {"name": "byte", "extra": 1},
        {"name": "char"},
        {"name": "char", "characters": 3},
        {"name": "char", "characters": "ba"},
        {"name": "char", "characters": ""},
        ["byte"],
        None,
    ],
)
def test_json_that_is_not_a_tokenizer_is_refused(value):
    with pytest.raises(DataError):
        tokenizers.from_json(value)
