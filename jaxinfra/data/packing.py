"""Rows of a fixed length cut out of the shards of a split: `concat` packing.

Row i of a shard, for row length T, is `tokens[i * T : i * T + T + 1]`: rows start T
apart and hold T + 1 tokens, so that inputs are columns 0 .. T - 1, targets columns
1 .. T, and every token of a shard but the first is a target in exactly one row. The
last row of a shard may be short: it is filled up with token 0.

Beside each token stands its segment: 1 for the first document in the row (which may
have begun in an earlier row), 2 for the next, and so on; 0 is padding.

Letters: B rows, T row length, N tokens and D documents of a shard, C document starts
(cuts) and R runs of one segment in a call.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data.shards import Shard, Split


class HostBatch(NamedTuple):
    """Packed rows in host memory."""

    tokens_BT1: np.ndarray  # uint16 or uint32 [B, T + 1], 0 where padded
    segments_BT1: np.ndarray  # uint8, uint16 or uint32 [B, T + 1], 0 where padded


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

    def gather(self, rows_B: np.ndarray) -> HostBatch:
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
            part = self._gather_shard(shard, rows_B[here])
            batch.tokens_BT1[here] = part.tokens_BT1
            batch.segments_BT1[here] = part.segments_BT1
        return batch

    def padding(self, num_rows: int) -> HostBatch:
        """Rows of nothing but padding."""
        shape = (num_rows, self.length + 1)
        return HostBatch(
            np.zeros(shape, self.split.dtype), np.zeros(shape, segment_dtype(shape[1]))
        )

    def _gather_shard(self, number: int, rows_B: np.ndarray) -> HostBatch:
        shard = self._shards[number]
        rows_B = rows_B - self._first_rows[number]
        segments_BT1 = _segments(
            shard.ends_D, rows_B * self.length, width=self.length + 1
        )
        num_whole = len(shard.windows)
        is_short_B = rows_B >= num_whole
        if not is_short_B.any():
            return HostBatch(shard.windows[rows_B], segments_BT1)
        tokens_BT1 = self.padding(rows_B.size).tokens_BT1
        tokens_BT1[~is_short_B] = shard.windows[rows_B[~is_short_B]]
        rest = shard.tokens_N[num_whole * self.length :]
        tokens_BT1[is_short_B, : rest.size] = rest
        segments_BT1[is_short_B, rest.size :] = 0
        return HostBatch(tokens_BT1, segments_BT1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _ShardRows:
    tokens_N: np.ndarray
    ends_D: np.ndarray  # position just after each document
    windows: np.ndarray  # view [whole rows, T + 1] of the tokens, without a copy
    num_rows: int  # whole rows, and a short one if tokens are left

    @classmethod
    def make(cls, shard: Shard, *, length: int) -> "_ShardRows":
        tokens_N = shard.tokens
        num_targets = tokens_N.size - 1
        windows = np.lib.stride_tricks.as_strided(
            tokens_N,
            shape=(num_targets // length, length + 1),
            strides=(length * tokens_N.itemsize, tokens_N.itemsize),
            writeable=False,
        )
        return cls(
            tokens_N=tokens_N,
            ends_D=np.cumsum(shard.lengths, dtype=np.int64),
            windows=windows,
            num_rows=-(-num_targets // length),
        )


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
