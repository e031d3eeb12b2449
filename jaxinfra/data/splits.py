"""Which documents are held out, and the order of the others: by their keys alone.

A key stands for a text, so that copies of it fall on the same side, and nothing needs
the texts together.
"""

import hashlib

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data import writer

KEY_DTYPE = np.dtype("S16")


def key(text: str, *, seed: int) -> bytes:
    """16 bytes that stand for a text: those of sha256 of seed and text."""
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()[: KEY_DTYPE.itemsize]


def split(keys_D: np.ndarray, *, held_out: float, seed: int) -> dict[str, np.ndarray]:
    """int64 numbers of the documents of `train`, shuffled by `seed`, and of `held_out`,
    in order, where any are asked for.

    Holds out the fraction `held_out` of the distinct keys, `KEY_DTYPE`: the smallest
    ones, at least one and not all. Raises DataError if there are not two.
    """
    is_held_D = (
        _is_held_out(keys_D, held_out) if held_out else np.zeros(len(keys_D), bool)
    )
    numbers = np.flatnonzero(~is_held_D)
    found = {"train": numbers[writer.shuffled_numbers(len(numbers), seed=seed)]}
    return found | ({"held_out": np.flatnonzero(is_held_D)} if held_out else {})


def _is_held_out(keys_D: np.ndarray, held_out: float) -> np.ndarray:
    ranked = np.unique(keys_D)
    if len(ranked) < 2:
        raise DataError(
            f"data.split=documents needs at least 2 distinct documents to hold one out "
            f"and has {len(ranked)}; use data.split=tail, or data.held_out=0"
        )
    number = min(max(round(held_out * len(ranked)), 1), len(ranked) - 1)
    return keys_D <= ranked[number - 1]
