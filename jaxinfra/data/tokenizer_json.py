"""Tokenizers of Hugging Face: a tokenizer.json, and how documents begin and end.

The extra hf is needed to encode and decode, not to train on ids.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data.tokenizer import checked_ids, id_dtype, json_sha256

_CHUNK_CHARS = 2**22  # encoded at a time by all cores; its tokens take about 300 MB
NEEDS_HF = (
    "{what} needs the extra hf, which is not installed: pip install 'jaxinfra[hf]'"
)


@dataclasses.dataclass(frozen=True)
class HfTokenizer:
    """A Hugging Face tokenizer: the text of its tokenizer.json, and a policy.

    vocab_size: highest id + 1, added tokens and holes included. A document starts with
    `bos_id`, unless None, and ends with `eod_id`. `tokenizer_files` makes it of any
    format. The extra hf is needed to encode and decode, not to train on ids.
    """

    tokenizer_json: str
    vocab_size: int
    eod_id: int
    bos_id: int | None = None
    name = "hf"

    def __post_init__(self):
        for key, value in (("eod_id", self.eod_id), ("bos_id", self.bos_id)):
            if value is not None and not 0 <= value < self.vocab_size:
                raise DataError(
                    f"tokenizer.{key}={value} is outside 0..{self.vocab_size - 1}; "
                    "prepare it again"
                )

    def encode(self, text: str) -> np.ndarray:
        [ids] = self.encode_batch([text])
        return ids

    def encode_batch(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        for chunk in _chunks(texts):
            try:
                found = self._plain.encode_batch_fast(chunk, add_special_tokens=False)
            except Exception as error:  # a plain Exception, or TypeError for surrogates
                raise DataError(f"the tokenizer refuses the text: {error}") from error
            for encoding in found:
                ids = np.array(encoding.ids, id_dtype(self.vocab_size))
                yield self._spelled(ids) if self.is_special[ids].any() else ids

    def decode(self, ids: np.ndarray) -> str:
        """As `Tokenizer.decode`; ids in holes of the vocabulary give no text either,
        other special tokens their names."""
        ids = checked_ids(ids, self.vocab_size)
        documents = np.split(ids, np.flatnonzero(ids == self.eod_id))
        return "".join(
            self._plain.decode(
                [i for i in document.tolist() if i not in (self.eod_id, self.bos_id)],
                skip_special_tokens=False,
            )
            for document in documents
        )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}

    def digest(self) -> str:
        return json_sha256(self.to_json())

    def library_tokenizer(self, *, has_special_text: bool) -> Any:
        """A new `tokenizers.Tokenizer`, of whole texts.

        Names of special tokens in a text are those tokens if `has_special_text`, else
        letters and signs like any others.
        """
        made = parse_tokenizer_json(self.tokenizer_json, where="the data set")
        found = 1 + max(made.get_vocab(with_added_tokens=True).values(), default=-1)
        if found != self.vocab_size:
            raise DataError(
                f"the tokenizer has {found} ids, but dataset.json says "
                f"vocab_size={self.vocab_size}; prepare it again"
            )
        # Else an EOD that its file does not call special would be taken for text.
        made.add_special_tokens(
            [made.id_to_token(i) for i in (self.eod_id, self.bos_id) if i is not None]
        )
        made.encode_special_tokens = not has_special_text
        return made

    @functools.cached_property
    def _plain(self) -> Any:
        return self.library_tokenizer(has_special_text=False)

    @functools.cached_property
    def is_special(self) -> np.ndarray:
        """bool [vocab_size]: ids that no text may give; a text may be unknown."""
        table = np.zeros(self.vocab_size, bool)
        added = self._plain.get_added_tokens_decoder()
        table[[i for i, token in added.items() if token.special]] = True
        model = json.loads(self.tokenizer_json)["model"]
        unknown = model.get("unk_id")  # of Unigram; others name it
        if unknown is None and model.get("unk_token") is not None:
            unknown = self._plain.token_to_id(model["unk_token"])
        if unknown is not None:
            table[unknown] = False
        return table

    def _spelled(self, ids: np.ndarray) -> np.ndarray:
        """`ids` with each special token spelled out, character by character.

        For models whose own vocabulary holds the name: Unigram prefers it to letters.
        """
        spelled: list[int] = []
        for i in ids.tolist():
            if not self.is_special[i]:
                spelled.append(i)
                continue
            name = self._plain.id_to_token(i)
            letters = [t.id for c in name for t in self._plain.model.tokenize(c)]
            if not letters or self.is_special[letters].any():
                raise DataError(
                    f"the text holds {name!r}, a special token of the tokenizer, which "
                    "has no other way to write it; remove it from the text"
                )
            spelled += letters
        return np.array(spelled, ids.dtype)


def parse_tokenizer_json(text: str, *, where: Any) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json, which cuts and fills up nothing.

    Raises DataError, naming `where`, if it is not one or the extra hf is missing.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(NEEDS_HF.format(what="this tokenizer")) from error
    try:
        made = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise DataError(
            f"{where} is not a tokenizer.json that tokenizers "
            f"{tokenizers.__version__} reads ({error}); restore the file, or upgrade "
            "tokenizers"
        ) from error
    made.no_truncation()
    made.no_padding()
    return made


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of about `_CHUNK_CHARS` characters; a longer text is whole."""
    chunk, num_chars = [], 0
    for text in texts:
        chunk.append(text)
        num_chars += len(text)
        if num_chars >= _CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk
