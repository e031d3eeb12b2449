"""Rows of a fixed length cut out of the shards of a split: `concat` packing.

Row i of a shard, for row length T, is `tokens[i * T : i * T + T + 1]`: rows start T
apart and hold T + 1 tokens, so that inputs are columns 0 .. T - 1, targets columns
1 .. T, and every token of a shard but the first is a target in exactly one row. The
last row of a shard may be short: it is filled up with token 0.

Beside each token stands its segment: 1 for the first document in the row (which may
have begun in an earlier row), 2 for the next, and so on; 0 is padding. In a data set
with masks, its weight stands there too: 1 if it counts as a target.

Letters: B rows, T row length, N tokens and D documents of a shard, C document starts
(cuts) and R runs of one segment in a call.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data.shards import MASK_DTYPE, Shard, Split


class Batch(NamedTuple):
    """Packed rows: numpy arrays here, `jax.Array`s after `device.to_device`.

    weights_BT1 is None where every token counts as a target, as in plain text.
    """

    tokens_BT1: Any  # uint16 or uint32 [B, T + 1], 0 where padded
    segments_BT1: Any  # uint8, uint16 or uint32 [B, T + 1], 0 where padded
    weights_BT1: Any = None  # uint8 [B, T + 1], 1 where the token counts as a target

    def put(self, here: np.ndarray, rows: "Batch") -> None:
        """Writes `rows` in place over those at `here`, int or bool [B]."""
        for array, part in zip(self, rows, strict=True):
            if array is not None:
                array[here] = part


class ConcatRows:
    """The rows of a split, numbered 0 .. num_rows - 1 shard after shard."""

    name = "concat-1"  # of the row definition: part of a stream's identity

    def __init__(self, split: Split, *, length: int):
        """Makes the table of rows; 8 bytes of memory a document.

        Raises DataError if the split has no token to predict.
        """
        if length < 1:
            raise DataError(f"train.length={length} must be 1 or more")
        self.split = split
        self.length = length
        self._shards = [_ShardRows.make(s, length=length) for s in split.shards]
        rows_after = np.cumsum([s.num_rows for s in self._shards], dtype=np.int64)
        self._first_rows = np.concatenate([[0], rows_after]).astype(np.int64)
        self.num_rows = int(self._first_rows[-1])
        if self.num_rows == 0:
            raise DataError(
                f"split {split.name!r} has {split.num_tokens} tokens, too few for one "
                "row; a row needs 2: prepare more text, or another held_out"
            )

    def gather(self, rows_B: np.ndarray) -> Batch:
        """Reads rows by number, int64 [B], any order, repeats allowed."""
        rows_B = np.asarray(rows_B, np.int64)
        if rows_B.size and not 0 <= rows_B.min() <= rows_B.max() < self.num_rows:
            raise IndexError(f"rows must be in 0 .. {self.num_rows - 1}: {rows_B}")
        shard_B = np.searchsorted(self._first_rows, rows_B, side="right") - 1
        if rows_B.size and (shard_B == shard_B[0]).all():
            return self._gather_shard(shard_B[0], rows_B)
        batch = self.padding(rows_B.size)
        for shard in np.unique(shard_B):
            here = np.flatnonzero(shard_B == shard)
            batch.put(here, self._gather_shard(shard, rows_B[here]))
        return batch

    def padding(self, num_rows: int) -> Batch:
        """Rows of nothing but padding."""
        shape = (num_rows, self.length + 1)
        has_mask = self.split.shards[0].mask is not None
        return Batch(
            np.zeros(shape, self.split.dtype),
            np.zeros(shape, segment_dtype(shape[1])),
            np.zeros(shape, MASK_DTYPE) if has_mask else None,
        )

    def _gather_shard(self, number: int, rows_B: np.ndarray) -> Batch:
        shard = self._shards[number]
        rows_B = rows_B - self._first_rows[number]
        segments_BT1 = _segments(
            shard.ends_D, rows_B * self.length, width=self.length + 1
        )
        is_short_B = rows_B >= shard.num_whole
        segments_BT1[is_short_B, shard.num_last :] = 0
        cut = (_cut(a_N, rows_B, length=self.length) for a_N in shard.arrays)
        tokens_BT1, *weights = cut
        return Batch(tokens_BT1, segments_BT1, *weights)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _ShardRows:
    arrays: tuple[np.ndarray, ...]  # [N] tokens, and weights where there are any
    ends_D: np.ndarray  # position just after each document
    num_whole: int  # rows of T + 1 tokens
    num_last: int  # tokens left for a short row, of which the first is no target
    num_rows: int  # whole rows, and a short one if a target is left

    @classmethod
    def make(cls, shard: Shard, *, length: int) -> "_ShardRows":
        num_targets = shard.tokens.size - 1
        num_whole = num_targets // length
        return cls(
            arrays=tuple(a for a in (shard.tokens, shard.mask) if a is not None),
            ends_D=np.cumsum(shard.lengths, dtype=np.int64),
            num_whole=num_whole,
            num_last=shard.tokens.size - num_whole * length,
            num_rows=-(-num_targets // length),
        )


def _cut(array_N: np.ndarray, rows_B: np.ndarray, *, length: int) -> np.ndarray:
    """Rows [B, T + 1] of an array with an item for each token; 0 after its end."""
    num_whole = (array_N.size - 1) // length
    windows = np.lib.stride_tricks.as_strided(  # a view, without a copy
        array_N,
        shape=(num_whole, length + 1),
        strides=(length * array_N.itemsize, array_N.itemsize),
        writeable=False,
    )
    is_short_B = rows_B >= num_whole
    if not is_short_B.any():
        return windows[rows_B]
    cut_BT1 = np.zeros((rows_B.size, length + 1), array_N.dtype)
    cut_BT1[~is_short_B] = windows[rows_B[~is_short_B]]
    rest = array_N[num_whole * length :]
    cut_BT1[is_short_B, : rest.size] = rest
    return cut_BT1


def segment_dtype(width: int) -> np.dtype:
    """The smallest that counts a document at every column, so it never wraps."""
    return np.min_scalar_type(width)


def _segments(ends_D: np.ndarray, starts_B: np.ndarray, *, width: int) -> np.ndarray:
    """Segments [B, width] of rows that start at `starts_B`, padding not yet cleared.

    Lists the runs of one segment in all rows, then repeats each segment number by its
    run's length: work by documents in small arrays, by tokens in one call.
    """
    num_rows = starts_B.size
    first_B = np.searchsorted(ends_D, starts_B, side="right")
    last_B = np.searchsorted(ends_D, starts_B + (width - 1), side="right")
    cuts_B = last_B - first_B
    runs_B = cuts_B + 1
    row_R = np.repeat(np.arange(num_rows), runs_B)
    segment_R = np.arange(row_R.size) - (np.cumsum(runs_B) - runs_B)[row_R] + 1
    # Run 1 of a row begins at its column 0, run s + 1 where the document of run s ends.
    document_R = np.maximum(first_B[row_R] + segment_R - 2, 0)
    column_R = np.where(segment_R == 1, 0, ends_D[document_R] - starts_B[row_R])
    begin_R = row_R * width + column_R
    length_R = np.diff(begin_R, append=num_rows * width)
    segment_R = segment_R.astype(segment_dtype(width))
    return np.repeat(segment_R, length_R).reshape(num_rows, width)
