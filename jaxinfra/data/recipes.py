"""What is done to the texts of a corpus on their way to ids, a chunk at a time.

`parts` reads the texts and keeps what comes out; nothing here knows of files.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxinfra.data import cleaning, duplicates, splits
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data.sources import Piece

FACTS = np.dtype(
    [
        ("tokens", "<i8"),
        ("bytes", "<i8"),  # of its text as UTF-8
        ("chars", "<i8"),
        ("key", splits.KEY_DTYPE),  # empty where nothing is held out
        ("copy", duplicates.COPY_DTYPE),  # empty where copies are kept
    ]
)
CHUNK_CHARS = 2**21  # its tokens take about 150 MB while they are made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to every text."""

    tokenizer_json: str  # `Tokenizer.to_json`, as JSON
    text_key: str
    document_separator: str | None
    rules: cleaning.Rules
    key_seed: int | None  # of `splits.key`, None where nothing is held out
    has_copies: bool  # whether copies are to be found

    @functools.cached_property
    def digest(self) -> str:
        return tokenizers.json_sha256(dataclasses.asdict(self))

    @property
    def ids_dtype(self) -> np.dtype:
        return tokenizers.id_dtype(_tokenizer(self.tokenizer_json).vocab_size)


class Made(NamedTuple):
    """What texts became."""

    ids_N: np.ndarray  # document after document
    facts_D: np.ndarray  # FACTS; its tokens sum to N
    counts_C2: np.ndarray  # int64: documents and characters that each step took


def make(texts: Sequence[str], recipe: Recipe) -> Made:
    """Cleans and encodes texts."""
    steps = cleaning.steps(recipe.rules)
    left, counts = cleaning.clean(texts, steps)
    counts_C2 = [(count.documents, count.characters) for count in counts]
    tokenizer = _tokenizer(recipe.tokenizer_json)
    documents = list(encode(tokenizer, [*map(Piece, left)]))
    return Made(
        ids_N=np.concatenate([np.empty(0, recipe.ids_dtype), *documents]),
        facts_D=_facts(left, documents, recipe),
        counts_C2=np.array(counts_C2, np.int64).reshape(len(steps), 2),
    )


def encode(
    tokenizer: tokenizers.Tokenizer, pieces: Sequence[Piece]
) -> Iterator[np.ndarray]:
    """The ids of each piece, `id_dtype`, with BOS, where the tokenizer has one, and EOD
    at the ends of its document."""
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    eod, none = np.array([tokenizer.eod_id], dtype), np.array([], dtype)
    bos = none if tokenizer.bos_id is None else np.array([tokenizer.bos_id], dtype)
    ids = tokenizer.encode_batch(piece.text for piece in pieces)
    for p, i in zip(pieces, ids, strict=True):
        yield np.concatenate(
            [bos if p.is_start else none, i, eod if p.is_end else none]
        )


def chunks(texts: Iterable[str], max_chars: int = CHUNK_CHARS) -> Iterator[list[str]]:
    """The texts in lists that end where they have `max_chars` or more."""
    chunk, num_chars = [], 0
    for text in texts:
        chunk.append(text)
        num_chars += len(text)
        if num_chars >= max_chars:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


def _facts(
    texts: Sequence[str], documents: Sequence[np.ndarray], recipe: Recipe
) -> np.ndarray:
    facts_D = np.zeros(len(texts), FACTS)
    facts_D["tokens"] = [len(ids) for ids in documents]
    facts_D["bytes"] = [len(text.encode("utf-8")) for text in texts]
    facts_D["chars"] = [len(text) for text in texts]
    if recipe.key_seed is not None:
        facts_D["key"] = [splits.key(text, seed=recipe.key_seed) for text in texts]
    if recipe.has_copies:
        facts_D["copy"] = [duplicates.copy_digest(text) for text in texts]
    return facts_D


@functools.lru_cache(maxsize=1)
def _tokenizer(tokenizer_json: str) -> tokenizers.Tokenizer:
    """Made once in a process, not for every chunk."""
    return tokenizers.from_json(json.loads(tokenizer_json))
