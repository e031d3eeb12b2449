"""The turn of every row: a permutation of 0 .. size - 1 that is computed, not stored.

A Feistel network over Z_a x Z_b, a near-square grid that holds `size` points (index =
left * b + right): rounds add a hash of one half to the other half, modulo a or b in
turn, which is a bijection whatever the hash. a is even: were both odd, every round
would be an even permutation, and half of all orders out of reach. Points that land
outside 0 .. size - 1 are sent through again until they land inside; with less than a of
a * b points outside, the second pass is rare. Every index costs the same at every
position and in every epoch.

Sources: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002
(method 2, cycle walking; method 3, the generalised Feistel cipher over a * b points).
The hash is the output function of SplitMix64: G. Steele, D. Lea and C. Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

import dataclasses
import math
from typing import Any, Protocol

import numpy as np

VERSION = 1  # of the numbers themselves: part of a stream's identity
MAX_SIZE = 2**48
WINDOW_BLOCKS = 64

# By chi-square over the epochs, in sigmas off even: all 5,040 orders of 7 points, 11
# with 12 rounds, under 3 with 16; joint places of two of 64 rows, 8 with 6, 2 with 8.
_ROUNDS, _ROUNDS_SMALL, _SMALL_SIZE = 8, 16, 1024
_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd


class Mixed(Protocol):
    """What `mixture.Mixture` is to an order."""

    def locate(self, global_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def rows_of(self, number: int, global_row: int) -> int: ...
    def identity(self) -> list[list[int]]: ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """Which row of which set each global row is.

    Every epoch of a set has each of its rows once, in an order of its own if shuffled.
    `block` above 0 keeps rows that lie together near each other, for storage that is
    read by ranges: blocks of so many rows are shuffled, then the rows of each
    `WINDOW_BLOCKS` blocks among themselves.
    """

    num_rows: tuple[int, ...]  # of each set
    mixture: Mixed | None = None  # None: there is one set
    seed: int
    is_shuffled: bool = True
    block: int = 0

    def locate(self, global_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(set, row of it), int64 [B] each, of global rows, int64 [B]."""
        set_B, turn_B = np.zeros_like(global_rows), global_rows
        if self.mixture is not None:
            set_B, turn_B = self.mixture.locate(global_rows)
        row_B = np.empty_like(global_rows)
        for number, size in enumerate(self.num_rows):
            chosen = set_B == number
            row_B[chosen] = self._rows(turn_B[chosen], number, size)
        return set_B, row_B

    def rows_of(self, number: int, global_row: int) -> int:
        """Rows of set `number` before a global row."""
        if self.mixture is None:
            return global_row
        return self.mixture.rows_of(number, global_row)

    def identity(self) -> dict[str, Any]:
        """What must not change for a global row to stay the same row: JSON."""
        by_block = f"-blocks-{self.block}x{WINDOW_BLOCKS}" if self.block else ""
        name = f"feistel-{VERSION}{by_block}" if self.is_shuffled else "sequential"
        mixed = {} if self.mixture is None else {"mixture": self.mixture.identity()}
        return {"order": name, "seed": self.seed, **mixed}

    def _rows(self, turn_B: np.ndarray, number: int, size: int) -> np.ndarray:
        epoch, turn = np.divmod(turn_B, size)
        if not self.is_shuffled:
            return turn
        seed = (self.seed + number * _GAMMA) & _MASK
        if not 0 < self.block < size:
            return permute(turn, size=size, seed=seed, epoch=epoch).astype(np.int64)
        return _by_blocks(turn, epoch, size=size, seed=seed, block=self.block)


def _by_blocks(
    turn: np.ndarray, epoch: np.ndarray, *, size: int, seed: int, block: int
) -> np.ndarray:
    """As `Order`. A last block that is short stays last, so that places are known."""
    room = block * WINDOW_BLOCKS
    window, place = np.divmod(turn, room)
    num_windows, rest = -(-size // room), size % room
    # Another order in every window of every epoch: its number is the epoch here.
    key = epoch * num_windows + window
    within = (seed + _GAMMA) & _MASK
    is_last = (window == num_windows - 1) & (rest > 0)
    for here, count in ((~is_last, room), (is_last, rest)):
        if here.any():
            place[here] = permute(place[here], size=count, seed=within, epoch=key[here])
    slot, offset = np.divmod(window * room + place, block)
    is_whole = slot < size // block
    slot[is_whole] = permute(
        slot[is_whole], size=size // block, seed=seed, epoch=epoch[is_whole]
    )
    return slot * block + offset


def permute(
    index: np.ndarray, *, size: int, seed: int, epoch: int | np.ndarray
) -> np.ndarray:
    """Place of every index [N] in the order of (seed, epoch), uint64 [N].

    For one (seed, epoch) a bijection of 0 .. size - 1. `epoch` may be one number or one
    for each index. Raises ValueError unless 1 <= size <= 2**48, 0 <= seed < 2**64 and
    every index is in 0 .. size - 1.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size={size} must be in 1 .. 2**48")
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed={seed} must be in 0 .. 2**64 - 1")
    index = np.asarray(index)
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(f"every index must be in 0 .. {size - 1}")
    place = index.astype(np.uint64)
    num_rounds = _ROUNDS_SMALL if size < _SMALL_SIZE else _ROUNDS
    epoch_N = np.atleast_1d(np.asarray(epoch).astype(np.uint64))
    keys_RN = _round_keys(seed, epoch_N, num_rounds=num_rounds)
    place = _feistel(place, keys_RN, size=size)
    while (outside := np.flatnonzero(place >= np.uint64(size))).size:
        keys_RO = keys_RN if keys_RN.shape[1] == 1 else keys_RN[:, outside]
        place[outside] = _feistel(place[outside], keys_RO, size=size)
    return place


def _round_keys(seed: int, epoch_N: np.ndarray, *, num_rounds: int) -> np.ndarray:
    """One 64-bit key for each round and epoch, [R, N].

    A SplitMix64 stream that starts at the hashed seed gives each epoch its state, and
    the stream that starts there the keys of its rounds: seed and epoch do not commute.
    """
    seed_1 = _mix(np.array([(seed + _GAMMA) & _MASK], np.uint64))
    state_N = _mix(seed_1 + (epoch_N + np.uint64(1)) * np.uint64(_GAMMA))
    rounds_R = np.arange(1, num_rounds + 1, dtype=np.uint64)
    return _mix(state_N[None, :] + rounds_R[:, None] * np.uint64(_GAMMA))


def _feistel(index: np.ndarray, keys_RN: np.ndarray, *, size: int) -> np.ndarray:
    num_rows = math.isqrt(size - 1) + 1
    num_rows += num_rows % 2
    rows, columns = np.uint64(num_rows), np.uint64(-(-size // num_rows))
    left, right = np.divmod(index, columns)
    for r in range(0, len(keys_RN), 2):
        left = (left + _mix(right + keys_RN[r]) % rows) % rows
        right = (right + _mix(left + keys_RN[r + 1]) % columns) % columns
    return left * columns + right


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output function; a bijection of the 64-bit numbers."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
