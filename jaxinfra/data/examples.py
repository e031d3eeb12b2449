"""Labelled examples in memory: the batch of step k as a pure function of (seed, data,
k), in the words and by the permutation of `data.batches`.

    global row g        k * batch_size + p, for position p of the batch of step k
    epoch e, turn i     divmod(g, num_examples)
    example r           `order.permute(i; seed, e)`, or i itself where not shuffled

Any arrays with rows first will do, also mapped from a file: a batch copies its rows
alone. Imports no jax.
"""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data.order import Order

_ALL = slice(None)


class Examples(NamedTuple):
    """Rows of a batch: numpy arrays here, `jax.Array`s after `device.to_device`."""

    inputs: Any  # [B, ...], any dtype; small ones are quickest on their way
    labels: Any  # [B, ...]
    weights_B: Any  # float32: 1, or 0 for a row that fills up the last batch
    rows_B: Any  # uint32: place in the global batch, by which dropout draws


def make_stream(
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
) -> "Stream":
    """An endless stream of batches; DataError if rows or numbers do not fit."""
    if not 0 <= seed < 2**64:
        raise DataError(f"run.seed={seed} must be in 0 .. 2**64 - 1")
    held = _held(inputs, labels, batch_size)
    return Stream(held=held, batch_size=batch_size, seed=seed, shuffle=shuffle)


def make_evaluation(
    inputs: np.ndarray, labels: np.ndarray, *, batch_size: int
) -> "Evaluation":
    """All examples once, in order; DataError as `make_stream`."""
    held = _held(inputs, labels, batch_size)
    return Evaluation(held=held, batch_size=batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Batches for training, one for every step k >= 0."""

    held: "_Held"
    batch_size: int
    seed: int
    shuffle: bool

    def batch(self, step: int, positions: slice | np.ndarray = _ALL) -> Examples:
        """The rows of step `step`, or those at some positions of its global batch."""
        positions = np.arange(self.batch_size, dtype=np.int64)[positions]
        _, rows = self._order.locate(step * self.batch_size + positions)
        return self.held.gather(rows, positions)

    def identity(self) -> dict[str, Any]:
        """What must not change for step k to stay the same batch: ints and strings."""
        return {
            "examples": self.held.digest(),
            "batch_size": self.batch_size,
            **self._order.identity(),
        }

    @property
    def _order(self) -> Order:
        return Order(
            num_rows=(self.held.size,), seed=self.seed, is_shuffled=self.shuffle
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Batches that read every example once; the last one is filled up with zeros."""

    held: "_Held"
    batch_size: int
    bytes_per_token = None  # what is predicted is no text

    @property
    def num_batches(self) -> int:
        return -(-self.held.size // self.batch_size)

    def batch(self, step: int, positions: slice | np.ndarray = _ALL) -> Examples:
        """As `Stream.batch`, for steps 0 .. num_batches - 1; filling has weight 0."""
        if not 0 <= step < self.num_batches:
            raise IndexError(f"batch {step} is not in 0 .. {self.num_batches - 1}")
        positions = np.arange(self.batch_size, dtype=np.int64)[positions]
        return self.held.gather(step * self.batch_size + positions, positions)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Held:
    inputs: np.ndarray
    labels: np.ndarray

    @property
    def size(self) -> int:
        return len(self.inputs)

    def gather(self, rows_B: np.ndarray, positions_B: np.ndarray) -> Examples:
        """Examples by number; numbers from `size` on give zeros of weight 0."""
        is_row_B = rows_B < self.size
        taken = []
        for array in (self.inputs, self.labels):
            rows = np.zeros((rows_B.size, *array.shape[1:]), array.dtype)
            rows[is_row_B] = array[rows_B[is_row_B]]
            taken.append(rows)
        weights_B = is_row_B.astype(np.float32)
        return Examples(*taken, weights_B, positions_B.astype(np.uint32))

    def digest(self) -> str:
        """SHA-256 in hex of dtypes, shapes and values."""
        total = hashlib.sha256()
        for array in (self.inputs, self.labels):
            total.update(f"{array.dtype.str}{array.shape}".encode())
            total.update(np.ascontiguousarray(array))
        return total.hexdigest()


def _held(inputs: np.ndarray, labels: np.ndarray, batch_size: int) -> _Held:
    if batch_size < 1:
        raise DataError(f"train.batch_size={batch_size} must be 1 or more")
    if not len(inputs) == len(labels) > 0:
        raise DataError(
            f"{len(inputs)} inputs and {len(labels)} labels; each input needs one, and "
            "there must be some"
        )
    return _Held(inputs=inputs, labels=labels)
