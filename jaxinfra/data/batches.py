"""The batch of step k as a pure function of (seed, data sets, packing, k).

    step k              counts from 0
    position p          0 .. rows of step k - 1, the row within the global batch
    global row g        rows of all steps before k, + p: counts every row trained on
    set, turn n         of a mixture: `stages` says whose row g is; of one set n is g
    epoch e, turn i     divmod(n, num_rows): pass over the split, and turn within it
    row r               the i-th row of epoch e: `order` computes it
    shard s, offset     where row r is cut from: `packing` finds it

Nothing here depends on the number of hosts, on the mesh or on what was read before: a
host reads the positions that it needs, and a restart at step k asks for step k. A
stream has no state but k; its `identity` says what k means, and stands in the
checkpoint.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import jaxinfra
from jaxinfra.config import DataError
from jaxinfra.data.order import Order
from jaxinfra.data.packing import Batch, Plan, Rows, Sources
from jaxinfra.data.shards import Split
from jaxinfra.stages import BatchSizes, Weights

_ALL = slice(None)
_STEPS_AHEAD = 64  # planned at once: small calls of numpy cost most


def make_stream(
    splits: Split | Mapping[str, Split],
    *,
    length: int,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    block: int = 0,
    ramp: str = "",
    weights: Weights | None = None,
) -> "Stream":
    """An endless stream of batches of `batch_size` rows of `length` + 1 tokens.

    Several splits are mixed by `weights`, of `stages.parse`; None: by their numbers of
    rows. `ramp`: stages of the batch size that end with `batch_size`. `block`: as
    `order.Order`. Raises DataError if a split has no row, and ConfigError.
    """
    if not 0 <= seed < 2**64:
        raise DataError(f"run.seed={seed} must be in 0 .. 2**64 - 1")
    named = {"": splits} if isinstance(splits, Split) else splits
    rows = {name: Rows(split, length=length) for name, split in named.items()}
    num_rows = {name: r.num_rows for name, r in rows.items()}
    sizes = BatchSizes(batch_size, ramp)
    # By its public name, which loads the module: one set needs none of it.
    is_one = len(rows) == 1
    order = Order(
        num_rows=tuple(num_rows.values()),
        mixture=None if is_one else jaxinfra.Mixture(num_rows, weights, sizes),
        seed=seed,
        is_shuffled=shuffle,
        block=block,
    )
    return Stream(sources=Sources([*rows.values()]), order=order, sizes=sizes)


def make_evaluation(split: Split, *, length: int, batch_size: int) -> "Evaluation":
    """All rows of a split once, in order, however it is laid out; raises as
    `make_stream`."""
    size = BatchSizes(batch_size).of(0)
    return Evaluation(Rows(split, length=length, as_laid_out=False), size)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Batches for training, one for every step k >= 0."""

    sources: Sources
    order: Order
    sizes: BatchSizes

    def batch(self, step: int, positions: slice | np.ndarray = _ALL) -> Batch:
        """The rows of step `step`, or those at some positions of its global batch."""
        positions = np.arange(self.sizes.of(step), dtype=np.int64)[positions]
        plan = self._planned(step, positions)
        if not self.sources.is_remote:
            return self.sources.read(plan)
        self.sources.ahead(plan)
        batch = self.sources.read(plan)
        for later in range(step + 1, step + 5):
            if self.sizes.of(later) == self.sizes.of(step):
                self.sources.ahead(self._planned(later, positions))
        return batch

    def identity(self) -> dict[str, Any]:
        """What must not change for step k to stay the same batch: JSON."""
        sizes = {"batch_size": self.sizes.sizes[-1]}
        sizes |= {"batch_ramp": self.sizes.ramp} if self.sizes.ramp else {}
        return self.sources.identity() | self.order.identity() | sizes

    def _planned(self, step: int, positions: np.ndarray) -> Plan:
        room = self.sources.plan_rows // max(positions.size, 1)
        count = min(max(room, 1), _STEPS_AHEAD)
        part, number = divmod(step, count)
        if self.sizes.of(part * count) != self.sizes.of((part + 1) * count - 1):
            part, number, count = step, 0, 1
        plan = self._plan(part, count, positions.tobytes())
        return plan.at(slice(number * positions.size, (number + 1) * positions.size))

    @functools.cached_property
    def _plan(self) -> Callable[[int, int, bytes], Plan]:
        @functools.lru_cache(maxsize=8)
        def plan(part: int, count: int, positions: bytes) -> Plan:
            """Of the positions, int64, of `count` steps from step part * count."""
            firsts = [self.sizes.rows_before(part * count + i) for i in range(count)]
            here = np.frombuffer(positions, np.int64)
            global_rows = np.add.outer(np.array(firsts, np.int64), here).reshape(-1)
            return self.sources.plan(*self.order.locate(global_rows))

        return plan


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Batches that read every row once; the last one is filled up with padding."""

    rows: Rows
    batch_size: int

    @property
    def bytes_per_token(self) -> float | None:
        """Of the split's text; None where masks leave out some of it."""
        split = self.rows.split
        return None if split.has_mask else split.text_bytes / split.num_tokens

    @property
    def num_batches(self) -> int:
        return -(-self.rows.num_rows // self.batch_size)

    def batch(self, step: int, positions: slice | np.ndarray = _ALL) -> Batch:
        """As `Stream.batch`, for steps 0 .. num_batches - 1; padding has segment 0."""
        if not 0 <= step < self.num_batches:
            raise IndexError(f"batch {step} is not in 0 .. {self.num_batches - 1}")
        positions = np.arange(self.batch_size, dtype=np.int64)[positions]
        rows = step * self.batch_size + positions
        return self.rows.gather(np.where(rows < self.rows.num_rows, rows, -1))
