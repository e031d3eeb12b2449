"""Several data sets as one: which row of which set a global row is, in closed form.

Among the rows of a stage, data set j takes its part of what the sets after it have
left: of m such rows floor((a_j m + P_j / 2) / P_j), where a are the parts and P_j is
a_0 + ... + a_j. So shares are exact at every length, to within a row or two for each
set, the n-th row of a set is its n-th, wherever a step begins, and row 10**11 costs
what row 0 does.
"""

import fractions
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxinfra.config import ConfigError
from jaxinfra.stages import BatchSizes, Stage, Weights

_MAX_PARTS = 2**31  # products of parts then stay within int64


class Mixture:
    """Which row of which set a global row is."""

    def __init__(
        self, num_rows: Mapping[str, int], weights: Weights | None, sizes: BatchSizes
    ):
        """`num_rows` of each set; `weights`: stages for each, in any order, and None
        the numbers of rows. Raises ConfigError for a set without a weight, a weight
        without a set, and steps at which all weights are 0."""
        if weights is None:
            weights = {name: (Stage(0, n),) for name, n in num_rows.items()}
        if weights.keys() != num_rows.keys():
            raise ConfigError(
                f"data.weights are of {', '.join(sorted(weights))} and data.sets of "
                f"{', '.join(sorted(num_rows))}; give each set a weight, or none at all"
            )
        weights = {name: weights[name] for name in num_rows}
        steps = sorted({stage.step for stages in weights.values() for stage in stages})
        self.parts = []  # for each stage those of each set
        for step in steps:
            now = [
                [stage.value for stage in stages if stage.step <= step][-1]
                for stages in weights.values()
            ]
            if not any(now):
                raise ConfigError(
                    f"data.weights of {', '.join(weights)} are all 0 from step {step}; "
                    "give one of them more"
                )
            self.parts.append(_as_parts(now))
        rows = [sizes.rows_before(step) for step in steps]
        self._first_rows = np.array(rows, np.int64)
        lengths = np.diff(self._first_rows).tolist()
        taken = [[0] * len(weights)]
        for parts, length in zip(self.parts, lengths):
            more = _counts(parts, length)
            taken.append([a + b for a, b in zip(taken[-1], more, strict=True)])
        self._taken = np.array(taken, np.int64)  # [stages, sets] rows before each stage

    def identity(self) -> list[list[int]]:
        """First global row and parts of each stage."""
        firsts = self._first_rows.tolist()
        return [[row, *parts] for row, parts in zip(firsts, self.parts, strict=True)]

    def rows_of(self, number: int, global_row: int) -> int:
        """Rows of set `number` before a global row."""
        stage = int(np.searchsorted(self._first_rows, global_row, side="right")) - 1
        more = _counts(self.parts[stage], global_row - int(self._first_rows[stage]))
        return int(self._taken[stage, number]) + more[number]

    def locate(self, global_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(set, turn in that set), int64 [B] each, of global rows, int64 [B]."""
        set_B = np.zeros(len(global_rows), np.int64)
        turn_B = np.zeros(len(global_rows), np.int64)
        stage_B = np.searchsorted(self._first_rows, global_rows, side="right") - 1
        for stage in np.unique(stage_B):
            here = np.flatnonzero(stage_B == stage)
            left = global_rows[here] - self._first_rows[stage]
            for number, (part, total) in reversed(
                list(enumerate(_rates(self.parts[stage])))
            ):
                before = _share(left, part, total)
                is_taken = _share(left + 1, part, total) > before
                chosen = here[is_taken]
                set_B[chosen] = number
                turn_B[chosen] = before[is_taken] + self._taken[stage, number]
                here, left = here[~is_taken], (left - before)[~is_taken]
        return set_B, turn_B


def _as_parts(weights: Sequence[fractions.Fraction | int]) -> list[int]:
    """Whole numbers in these proportions, their sum at most `_MAX_PARTS`."""
    denominator = math.lcm(*(w.denominator for w in weights))
    parts = [int(w * denominator) for w in weights]
    factor = math.gcd(*parts)
    parts = [part // factor for part in parts]
    if (total := sum(parts)) <= _MAX_PARTS:
        return parts
    room = _MAX_PARTS - len(parts)
    return [max(part * room // total, int(part > 0)) for part in parts]


def _rates(parts: Sequence[int]) -> list[tuple[int, int]]:
    """(part, sum of the parts up to it) of each set."""
    return list(zip(parts, np.cumsum(parts).tolist(), strict=True))


def _share(rows: np.ndarray, part: int, total: int) -> np.ndarray:
    """floor((part * rows + total // 2) / total), without overflow."""
    if part == total:  # also the first set, if it has any weight
        return rows
    if part == 0:
        return np.zeros_like(rows)
    whole, rest = np.divmod(rows, total)
    return part * whole + (part * rest + total // 2) // total


def _counts(parts: Sequence[int], length: int) -> list[int]:
    """Rows that each set has among the first `length` of a stage."""
    left, counts = np.array([length], np.int64), []
    for part, total in reversed(_rates(parts)):
        taken = _share(left, part, total)
        counts.append(int(taken[0]))
        left = left - taken
    return counts[::-1]
