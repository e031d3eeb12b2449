"""The batch of step k as a pure function of (seed, data set, packing, k).

    step k              counts from 0
    position p          0 .. batch_size - 1, the row within the global batch
    global row g        k * batch_size + p: counts every row ever trained on
    epoch e, turn i     divmod(g, num_rows): pass over the split, and turn within it
    row r               the i-th row of epoch e: `order.permute(i; seed, e)`, or i
                        itself where rows are not shuffled
    shard s, offset     where row r is cut from: `packing` finds it

Nothing here depends on the number of hosts, on the mesh or on what was read before: a
host reads the positions that it needs, and a restart at step k asks for step k. A
stream has no state but k; its `identity` says what k means, and stands in the
checkpoint.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data import order
from jaxinfra.data.packing import Batch, ConcatRows
from jaxinfra.data.shards import Split

_ALL = slice(None)


def make_stream(
    split: Split, *, length: int, batch_size: int, seed: int, shuffle: bool = True
) -> "Stream":
    """An endless stream of batches of `batch_size` rows of `length` + 1 tokens.

    Raises DataError if the split has no row, or a number is out of range.
    """
    if not 0 <= seed < 2**64:
        raise DataError(f"run.seed={seed} must be in 0 .. 2**64 - 1")
    return Stream(
        packing=_pack(split, length=length, batch_size=batch_size),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
    )


def make_evaluation(split: Split, *, length: int, batch_size: int) -> "Evaluation":
    """All rows of a split once, in order; raises as `make_stream`."""
    packing = _pack(split, length=length, batch_size=batch_size)
    return Evaluation(packing=packing, batch_size=batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Batches for training, one for every step k >= 0."""

    packing: ConcatRows
    batch_size: int
    seed: int
    shuffle: bool

    def rows(self, global_rows: np.ndarray) -> np.ndarray:
        """Row of the split, int64 [B], for each global row g, int64 [B]."""
        size = self.packing.num_rows
        return order.rows(
            global_rows, size=size, seed=self.seed, is_shuffled=self.shuffle
        )

    def batch(self, step: int, positions: slice | np.ndarray = _ALL) -> Batch:
        """The rows of step `step`, or those at some positions of its global batch."""
        positions = np.arange(self.batch_size, dtype=np.int64)[positions]
        return self.packing.gather(self.rows(step * self.batch_size + positions))

    def identity(self) -> dict[str, Any]:
        """What must not change for step k to stay the same batch: ints and strings."""
        return {
            "data": self.packing.split.digest,
            "packing": self.packing.name,
            "length": self.packing.length,
            "batch_size": self.batch_size,
            "order": order.name(is_shuffled=self.shuffle),
            "seed": self.seed,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Batches that read every row once; the last one is filled up with padding."""

    packing: ConcatRows
    batch_size: int

    @property
    def bytes_per_token(self) -> float | None:
        """Of the split's text; None where masks leave out some of it."""
        split = self.packing.split
        has_masks = any(shard.mask is not None for shard in split.shards)
        return None if has_masks else split.text_bytes / split.num_tokens

    @property
    def num_batches(self) -> int:
        return -(-self.packing.num_rows // self.batch_size)

    def batch(self, step: int, positions: slice | np.ndarray = _ALL) -> Batch:
        """As `Stream.batch`, for steps 0 .. num_batches - 1; padding has segment 0."""
        if not 0 <= step < self.num_batches:
            raise IndexError(f"batch {step} is not in 0 .. {self.num_batches - 1}")
        positions = np.arange(self.batch_size, dtype=np.int64)[positions]
        rows = step * self.batch_size + positions
        is_row = rows < self.packing.num_rows
        if is_row.all():
            return self.packing.gather(rows)
        batch = self.packing.padding(rows.size)
        batch.put(is_row, self.packing.gather(rows[is_row]))
        return batch


def _pack(split: Split, *, length: int, batch_size: int) -> ConcatRows:
    if batch_size < 1:
        raise DataError(f"train.batch_size={batch_size} must be 1 or more")
    return ConcatRows(split, length=length)
