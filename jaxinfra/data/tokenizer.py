"""Text to token ids and back, by bytes; the characters of a corpus are in
`char_tokenizer`, tokenizers of Hugging Face in `tokenizer_json`.

Every tokenizer keeps one id for the end of a document (EOD), some one for its beginning
(BOS). `encode` never adds them, `prepare` does, once at each end; and no text is ever
encoded to them or to another special token, whatever it says: that a document ends, or
that a user's turn begins, is not for a text to decide. Chat templates alone write
special tokens, in `chat`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol

import numpy as np

import jaxinfra
from jaxinfra.config import DataError

# Whether documents begin with BOS: as the tokenizer's own settings say, or so.
BosRule = Literal["tokenizer", "always", "never"]


class Tokenizer(Protocol):
    """A reversible map between text and ids 0 .. vocab_size - 1."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int:
        """Number of ids, EOD included."""
        ...

    @property
    def eod_id(self) -> int: ...

    @property
    def bos_id(self) -> int | None:
        """What a document starts with, None where it starts with its text."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, `id_dtype(vocab_size)` [N], no special one among them."""
        ...

    def encode_batch(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """`encode` of each text, by all cores where the tokenizer can."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Text of integer ids [N]; EOD and BOS give none. Raises DataError on ids
        outside the vocabulary."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes an equal tokenizer of."""
        ...

    def digest(self) -> str:
        """Hex sha256 of `to_json()`."""
        ...


def json_sha256(value: Any) -> str:
    """Hex sha256 of `value` as canonical JSON: sorted keys, no spaces, ASCII.

    What names something for ever: a tokenizer, a data set, a prepared text.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def id_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32; little-endian."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def checked_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`ids` as int64 [N]; DataError if one is outside 0 .. vocab_size - 1."""
    ids = np.asarray(ids).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise DataError(
            f"id {bad} is outside 0..{vocab_size - 1}, the ids of this tokenizer; "
            "decode with the tokenizer that made the ids"
        )
    return ids.astype(np.int64)


def from_json(value: Any) -> Tokenizer:
    """The tokenizer that `to_json` described; refuses anything it does not know."""
    match value:
        case {"name": "byte", **rest} if not rest:
            return ByteTokenizer()
        case {"name": "char", "characters": str(characters), **rest} if not rest:
            # By its public name, which loads the module: bytes need none of it.
            tokenizer = jaxinfra.CharTokenizer(characters)
            if tokenizer.characters != characters:
                raise DataError(
                    "tokenizer.characters must be distinct and sorted by code point; "
                    "take the tokenizer from the dataset.json that prepare wrote"
                )
            return tokenizer
        case {
            "name": "hf",
            "tokenizer_json": str(text),
            "vocab_size": int(vocab_size),
            "eod_id": int(eod_id),
            "bos_id": (int() | None) as bos_id,
            **rest,
        } if not rest:
            return jaxinfra.HfTokenizer(text, vocab_size, eod_id, bos_id)
    raise DataError(
        f"tokenizer {json.dumps(value)[:80]} is not known: it must be "
        '{"name": "byte"}, {"name": "char", "characters": "..."} or {"name": "hf", ...}'
        " as prepare writes it; prepare it again"
    )


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes: ids 0..255 are the bytes, 256 is EOD."""

    name = "byte"
    vocab_size = 257
    eod_id = 256
    bos_id = None

    def encode(self, text: str) -> np.ndarray:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"character {error.start} of the text is half a surrogate pair, which "
                "UTF-8 has no bytes for; remove it or encode the pair as one character"
            ) from error
        return np.frombuffer(data, np.uint8).astype(id_dtype(self.vocab_size))

    def encode_batch(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        return map(self.encode, texts)

    def decode(self, ids: np.ndarray) -> str:
        """As `Tokenizer.decode`; bytes that are not UTF-8 become U+FFFD."""
        ids = checked_ids(ids, self.vocab_size)
        # Documents one by one: bytes on two sides of an EOD are no character.
        documents = np.split(ids, np.flatnonzero(ids == self.eod_id))
        return "".join(
            d[d != self.eod_id].astype(np.uint8).tobytes().decode("utf-8", "replace")
            for d in documents
        )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}

    def digest(self) -> str:
        return json_sha256(self.to_json())
