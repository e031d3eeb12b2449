"""Documents that say what another one before them says: left out, the first is kept.

Exact copies are found by a hash. Near ones (extra `data`) are found by MinHash and
locality-sensitive hashing of runs of words, and each pair that this finds is compared
in full, so that none is left out by chance. Sources: Broder 1997, "On the resemblance
and containment of documents"; Lee et al. 2022, arXiv:2107.06499.
"""

import re
from collections.abc import Sequence

import numpy as np
import xxhash

from jaxinfra.config import DataError

COPY_DTYPE = np.dtype("S16")
THRESHOLD = 0.7  # shared runs of words among all of two documents
_HASHES = 128  # of a document; bands are chosen by datasketch for the threshold
_WORD = re.compile(r"[^\W_]+")
_RUN = 5  # words
_FACTORS = np.array(  # odd, without a pattern
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93,
     0xA0761D6478BD642F], np.uint64,
)  # fmt: skip


def without_copies(documents: Sequence[str]) -> list[int]:
    """Numbers of the documents to keep: the first of those that are equal but for their
    white space."""
    return first_of_each(np.array([*map(copy_digest, documents)], COPY_DTYPE)).tolist()


def copy_digest(text: str) -> bytes:
    """16 bytes that stand for a text but for its white space."""
    words = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return xxhash.xxh3_128_digest(words)


def first_of_each(digests_D: np.ndarray) -> np.ndarray:
    """int64: the number of the first document with each digest, in order."""
    return np.sort(np.unique(digests_D, return_index=True)[1])


def check_threshold(threshold: float) -> None:
    """Raises DataError for one that finds every document, or none, a near copy."""
    if not 0.1 <= threshold <= 1:
        raise DataError(f"near_threshold={threshold} must be from 0.1 to 1")


def without_near_copies(
    documents: Sequence[str], *, threshold: float = THRESHOLD, seed: int = 0
) -> list[int]:
    """Numbers of the documents to keep: those of which no kept document before has
    `threshold` or more of the runs of five words (Jaccard: shared ones among all).

    A pair just above the threshold may be missed, by chance that `seed` decides; none
    below is taken for one. Raises DataError without the extra data.
    """
    check_threshold(threshold)
    try:
        import datasketch
    except ImportError as error:
        raise DataError(
            "near duplicates need the extra data: pip install 'jaxinfra[data]'"
        ) from error
    # Found some way below the threshold, and then compared: few are missed.
    index = datasketch.MinHashLSH(
        threshold=max(0.1, threshold - 0.15), num_perm=_HASHES, weights=(0.1, 0.9)
    )
    made = datasketch.MinHash(num_perm=_HASHES, seed=seed + 1, hashfunc=_same)
    kept: list[int] = []
    for number, text in enumerate(documents):
        hashes = _run_hashes(text)
        sketch = made.copy()
        sketch.update_batch(hashes.tolist())
        found = index.query(sketch)
        if any(
            _jaccard(hashes, _run_hashes(documents[other])) >= threshold
            for other in sorted(found)
        ):
            continue
        index.insert(number, sketch, check_duplication=False)
        kept.append(number)
    return kept


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _run_hashes(text: str) -> np.ndarray:
    """uint32 hashes of the runs of words, each once, sorted; of a short text, its one
    run."""
    words = _words(text) or [text]
    word_W = np.array(
        [xxhash.xxh3_64_intdigest(w.encode("utf-8", "surrogatepass")) for w in words],
        np.uint64,
    )
    size = min(_RUN, len(words))
    runs_RN = np.lib.stride_tricks.sliding_window_view(word_W, size)
    # Linear in the words' hashes, which are random; the upper half depends on all bits.
    mixed_R = (runs_RN * _FACTORS[:size]).sum(axis=1, dtype=np.uint64)
    return np.unique((mixed_R >> np.uint64(32)).astype(np.uint32))


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _same(number: int) -> int:
    return number
