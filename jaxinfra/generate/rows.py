"""What is to be scored: rows of ids, and which tokens after which of their places.

Text becomes rows here, in the ways of lm-evaluation-harness, so that figures can be
compared; `score` gives each row its log-likelihoods. Imports no jax.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data.tokenizer import Tokenizer


class Row(NamedTuple):
    """ids_T: int [T >= 1], what the model reads, one document from its start.
    targets_Q: int [Q], tokens to be scored, each as what follows ids_T[:place + 1] for
    its place in places_Q."""

    ids_T: np.ndarray
    places_Q: np.ndarray
    targets_Q: np.ndarray


class Scored(NamedTuple):
    """Of each target of a row: its natural log-likelihood, float32 [Q], and whether it
    is the likeliest token at its place, bool [Q]."""

    logprobs_Q: np.ndarray
    is_greedy_Q: np.ndarray


class Score(Protocol):
    """A model and its parameters, as all that measures one sees them."""

    def __call__(self, rows: Sequence[Row], /) -> list[Scored]:
        """The scores of every row, in order."""
        ...


def start_id(tokenizer: Tokenizer) -> int:
    """What the first token of a document is scored after: BOS, or EOD where the
    tokenizer has none."""
    return tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id


def prompt_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of a document that begins with `text`: BOS first where the tokenizer has
    one; an empty one without it begins with EOD."""
    ids = tokenizer.encode(text).astype(np.int64)
    if tokenizer.bos_id is not None or not len(ids):
        return np.concatenate([[start_id(tokenizer)], ids])
    return ids


def continuation(
    context: Sequence[int] | np.ndarray,
    following: Sequence[int] | np.ndarray,
    *,
    length: int = 0,
) -> Row:
    """The row that scores `following` after `context`, both not empty.

    length: tokens that the model reads at most; what is too long loses its beginning. 0
    is no limit. Raises DataError where `following` alone is longer.
    """
    context, following = np.asarray(context), np.asarray(following)
    if not len(context) or not len(following):
        raise DataError("a context and what follows it need a token each")
    if length and len(following) > length:
        raise DataError(
            f"a continuation of {len(following)} tokens does not fit into rows of "
            f"{length}; raise the length"
        )
    ids = np.concatenate([context, following]).astype(np.int64)[:-1]
    ids = ids[-length:] if length else ids
    return Row(ids, np.arange(len(ids) - len(following), len(ids)), following)


def windows(
    ids_N: np.ndarray,
    start_id: int,
    *,
    length: int,
    stride: int = 0,
    counts_N: np.ndarray | None = None,
) -> Iterator[Row]:
    """Rows of at most `length` tokens that score every token of a document once.

    The first is scored after `start_id`. Each later window scores `stride` more tokens
    (0: `length`) and reads as many before them as fit, the last one too: what
    get_rolling_token_windows of the harness does with a context_len of length - stride
    + 1. Of tokens that do not count, where counts_N is given, none is scored.
    """
    stride = stride or length
    if not 1 <= stride <= length:
        raise DataError(
            f"stride={stride} must be from 1 to length={length}: the tokens that a "
            "window scores are among those that it reads"
        )
    ids_N1 = np.concatenate([[start_id], ids_N]).astype(np.int64)
    done, total = 0, len(ids_N)
    while done < total:
        end = min(done + (stride if done else length), total)
        first = max(0, end - length)
        scored = np.arange(done, end)
        if counts_N is not None:
            scored = scored[counts_N[done:end] > 0]
        yield Row(ids_N1[first:end], scored - first, ids_N1[scored + 1])
        done = end


def encode_pair(
    tokenizer: Tokenizer, context: str, following: str
) -> tuple[np.ndarray, np.ndarray]:
    """(ids of a document's first text, ids of what follows), cut where the context's
    own ids end; spaces that end the context are read with what follows."""
    kept = context.rstrip()
    following = context[len(kept) :] + following
    context_ids = prompt_ids(tokenizer, kept)
    whole = tokenizer.encode(kept + following).astype(np.int64)
    if tokenizer.bos_id is not None or not kept:
        whole = np.concatenate([context_ids[:1], whole])
    return context_ids, whole[len(context_ids) :]
