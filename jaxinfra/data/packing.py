"""Rows of a fixed length cut out of the shards of a split.

`concat`, for row length T: row i of a shard is `tokens[i * T : i * T + T + 1]`. Rows
start T apart and hold T + 1 tokens, so that inputs are columns 0 .. T - 1, targets
columns 1 .. T, and every token of a shard but the first is a target in exactly one row.
The last row of a shard may be short.

A split that was laid out for rows of this T (`fitting`) has a table of them instead:
row i is `tokens[rows[i, 0] : rows[i, 1]]`, whole documents as far as they fit.

Short rows are filled up with token 0. Beside the tokens of a row stand its cuts: how
many tokens it has, and the columns where documents begin. `Batch.segments_BT1` makes of
them 1 for the first document in the row (which may have begun in an earlier row), 2 for
the next, and so on; 0 for padding. In a data set with masks, the weight of each token
stands there too: 1 if it counts as a target.

Letters: B rows, T row length, C cuts of a row.
"""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data.order import MAX_SIZE
from jaxinfra.data.shards import CONCAT, MASK_DTYPE, Shard, Split

_PLAN_ROWS, _PLAN_CUTS = 4_096, 2**19  # planned at once; bounded by memory


class Batch(NamedTuple):
    """Packed rows: numpy arrays here, `jax.Array`s after `device.to_device`.

    weights_BT1 is None where every token counts as a target, as in plain text.
    """

    tokens_BT1: Any  # uint16 or uint32 [B, T + 1], 0 where padded
    cuts_BC: Any  # uint16 or uint32 [B, C]: tokens in the row, then where documents
    #   after the first begin, T + 1 where there are no more
    weights_BT1: Any = None  # uint8 [B, T + 1], 1 where the token counts as a target

    @property
    def segments_BT1(self) -> Any:
        """Which document of its row each token is of, from 1; 0 where padded. int32."""
        columns = np.arange(self.tokens_BT1.shape[1], dtype=np.int32)
        cuts_BC = self.cuts_BC.astype(np.int32)
        num_before = (cuts_BC[:, 1:, None] <= columns).sum(1, dtype=np.int32)
        return (num_before + 1) * (cuts_BC[:, :1] > columns)

    @property
    def per_token(self) -> tuple:
        """Tokens, segments and weights or None, [B, T + 1] each: what a loss sees."""
        return self.tokens_BT1, self.segments_BT1, self.weights_BT1


class Plan(NamedTuple):
    """Where rows are cut from, and how: what is known before any token is read."""

    source_B: np.ndarray  # number of the shard
    start_B: np.ndarray  # of the row in its tokens
    filled_B: np.ndarray  # tokens that are the row's
    cuts_BC: np.ndarray  # as in Batch

    def at(self, here: slice | np.ndarray) -> "Plan":
        return Plan(*(array[here] for array in self))


class Rows:
    """The rows of a split, numbered 0 .. num_rows - 1 shard after shard."""

    def __init__(self, split: Split, *, length: int, as_laid_out: bool = True):
        """`as_laid_out`: keep to the layout of the split, if it has one. Raises
        DataError if that is for another length, or there is no token to predict."""
        if length < 1:
            raise DataError(f"train.length={length} must be 1 or more")
        layout = split.layout if as_laid_out else CONCAT
        if layout.length not in (0, length):
            raise DataError(
                f"{split.folder} is laid out by {layout.name} for rows of "
                f"{layout.length} tokens, and train.length={length}; set train.length="
                f"{layout.length}, or prepare it with --length {length}"
            )
        self.split, self.length = split, length
        self._is_laid_out = layout.length > 0
        self.name = f"{layout.name}-1"  # of what a row is
        num_rows_S = -(-(split.tokens_S - 1) // length)
        num_rows_S = split.rows_S if self._is_laid_out else num_rows_S
        self._first_rows = np.concatenate([[0], np.cumsum(num_rows_S)]).astype(np.int64)
        self.num_rows = int(self._first_rows[-1])
        if not 0 <= self.num_rows <= MAX_SIZE or (num_rows_S < 0).any():
            raise DataError(
                f"{split.folder} has more rows than 2**48, says dataset.json; "
                "prepare it again"
            )
        most = layout.most_starts if self._is_laid_out else split.most_starts(length)
        self.num_cuts = 1 + min(most, length)
        if self.num_rows == 0:
            raise DataError(
                f"split {split.name!r} has {split.num_tokens} tokens, too few for one "
                "row; a row needs 2: prepare more text, or another held_out"
            )

    def gather(self, rows_B: np.ndarray) -> Batch:
        """Reads rows by number, int64 [B], any order, repeats allowed; -1 is a
        row of padding."""
        return Sources([self]).read(self.plan(rows_B))

    def plan(self, rows_B: np.ndarray) -> Plan:
        """Where rows are, by number, as `gather` takes them."""
        if rows_B.size and not -1 <= rows_B.min() <= rows_B.max() < self.num_rows:
            raise IndexError(f"rows must be in -1 .. {self.num_rows - 1}: {rows_B}")
        shard_B = np.searchsorted(self._first_rows, rows_B, side="right") - 1
        plan = Plan(
            np.maximum(shard_B, 0),
            *(np.zeros(rows_B.size, np.int64) for _ in range(2)),
            np.full(
                (rows_B.size, self.num_cuts),
                self.length + 1,
                _cut_dtype(self.length + 1),
            ),
        )
        plan.cuts_BC[:, 0] = 0
        numbers = set(shard_B.tolist()) - {-1}
        if self.split.is_remote:
            self.split.open_together(numbers)
        for number in numbers:
            here = np.flatnonzero(shard_B == number)
            shard = self.split.shards[number]
            start_B, filled_B = self._bounds(
                shard, rows_B[here] - self._first_rows[number]
            )
            plan.start_B[here], plan.filled_B[here] = start_B, filled_B
            plan.cuts_BC[here] = self._cuts(shard, start_B, filled_B)
        return plan

    def _bounds(
        self, shard: Shard, rows_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(start, tokens) of rows by their number in the shard."""
        if self._is_laid_out:
            assert shard.rows is not None
            bounds_B2 = shard.rows[rows_B]
            return bounds_B2[:, 0], bounds_B2[:, 1] - bounds_B2[:, 0]
        start_B = rows_B * self.length
        return start_B, np.minimum(shard.tokens_size - start_B, self.length + 1)

    def _cuts(
        self, shard: Shard, start_B: np.ndarray, filled_B: np.ndarray
    ) -> np.ndarray:
        width = self.length + 1
        first_B = np.searchsorted(shard.ends_D, start_B, side="right")
        index_BC = first_B[:, None] + np.arange(self.num_cuts)
        begin_BC = shard.ends_D.take(index_BC, mode="clip") - start_B[:, None]
        begin_BC = np.where(begin_BC < filled_B[:, None], begin_BC, width)
        if (begin_BC[:, -1] < width).any():
            raise DataError(
                f"{self.split.folder} has more documents in a row than dataset.json "
                "says; prepare it again"
            )
        cuts_BC = np.empty(begin_BC.shape, _cut_dtype(width))
        cuts_BC[:, 0], cuts_BC[:, 1:] = filled_B, begin_BC[:, :-1]
        return cuts_BC


class Sources:
    """The rows of one or more splits of one tokenizer, by the number of each."""

    def __init__(self, rows: Sequence[Rows]):
        """`rows` of each split, all of one length. Raises DataError where they have
        more than one tokenizer."""
        for other in rows:
            if other.split.tokenizer_digest != rows[0].split.tokenizer_digest:
                raise DataError(
                    f"{other.split.folder} and {rows[0].split.folder} have different "
                    "tokenizers; prepare one with the tokenizer of the other"
                )
        self.rows = rows
        counts = [len(r.split.shards) for r in rows]
        self._first_shards = [sum(counts[:number]) for number in range(len(counts))]
        self._width, self._dtype = rows[0].length + 1, rows[0].split.dtype
        self._has_mask = any(r.split.has_mask for r in rows)

    def plan(self, set_B: np.ndarray, row_B: np.ndarray) -> Plan:
        """Where rows are, by split and number, int64 [B] each."""
        if len(self.rows) == 1:
            return self.rows[0].plan(row_B)
        num_cuts = max(r.num_cuts for r in self.rows)
        whole = Plan(
            *(np.zeros(len(row_B), np.int64) for _ in range(3)),
            np.full((len(row_B), num_cuts), self._width, _cut_dtype(self._width)),
        )
        for number, rows in enumerate(self.rows):
            here = np.flatnonzero(set_B == number)
            plan = rows.plan(row_B[here])
            whole.source_B[here] = plan.source_B + self._first_shards[number]
            whole.start_B[here], whole.filled_B[here] = plan.start_B, plan.filled_B
            whole.cuts_BC[here, : rows.num_cuts] = plan.cuts_BC
        return whole

    @property
    def plan_rows(self) -> int:
        """How many rows to plan at once: none but what is read, by URL."""
        num_cuts = max(r.num_cuts for r in self.rows)
        return 1 if self.is_remote else min(_PLAN_ROWS, _PLAN_CUTS // num_cuts)

    @property
    def is_remote(self) -> bool:
        """Whether to tell what is read soon."""
        return any(r.split.is_remote for r in self.rows)

    def ahead(self, plan: Plan) -> None:
        """The rows of a plan are read soon."""
        for source in dict.fromkeys(plan.source_B.tolist()):
            starts_B = plan.start_B[plan.source_B == source]
            for windows in self._shard(source).arrays:
                windows.ahead(starts_B, self._width)

    def identity(self) -> dict[str, Any]:
        """What must not change for a row to stay the same tokens: JSON."""
        digests = [r.split.digest for r in self.rows]
        names = [r.name for r in self.rows]
        is_one = len(self.rows) == 1
        return {
            "data": digests[0] if is_one else digests,
            "packing": names[0] if is_one else names,
            "length": self._width - 1,
        }

    def read(self, plan: Plan) -> Batch:
        """The rows of a plan."""
        num_rows, width = len(plan.source_B), self._width
        tokens_BT1 = np.empty((num_rows, width), self._dtype)
        weights_BT1 = None
        if self._has_mask:  # a split without masks counts every token
            weights_BT1 = np.ones((num_rows, width), MASK_DTYPE)
        arrays = [array for array in (tokens_BT1, weights_BT1) if array is not None]
        filled_B, cuts_BC = plan.filled_B, plan.cuts_BC
        for source in set(plan.source_B.tolist()):
            here = np.flatnonzero(plan.source_B == source)
            for into, windows in zip(arrays, self._shard(source).arrays, strict=False):
                taken = windows.take(plan.start_B[here], width)
                into[here] = taken.items
                if taken.is_damaged is not None:
                    filled_B, cuts_BC = filled_B.copy(), cuts_BC.copy()
                    bad = here[taken.is_damaged]
                    filled_B[bad], cuts_BC[bad, 0], cuts_BC[bad, 1:] = 0, 0, width
        for array in arrays:
            _clear(array, filled_B)
        return Batch(tokens_BT1, cuts_BC, weights_BT1)

    def _shard(self, source: int) -> Shard:
        number = bisect.bisect_right(self._first_shards, source) - 1
        return self.rows[number].split.shards[source - self._first_shards[number]]


def _clear(items_BT1: np.ndarray, filled_B: np.ndarray) -> None:
    """Writes 0, in place, behind the first `filled` items of each row."""
    empty_B = items_BT1.shape[1] - filled_B
    total = int(empty_B.sum())
    if total:
        rows_P = np.repeat(np.arange(len(empty_B)), empty_B)
        before_P = np.repeat(np.cumsum(empty_B) - empty_B, empty_B)
        columns_P = np.arange(total) - before_P + filled_B[rows_P]
        items_BT1[rows_P, columns_P] = 0


def _cut_dtype(width: int) -> np.dtype:
    return np.min_scalar_type(width)
