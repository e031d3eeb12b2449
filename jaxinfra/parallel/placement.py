"""Which layers each chunk of a pipeline holds, and how they come there.

At rest the repeats of a stack lie in layer order, split evenly over the stages. A chunk
is a run of repeats that follow each other; the first chunk has the prefix too and the
last the suffix, so that these get fewer repeats. Where a chunk's repeats are not at
home on its stage, they travel once a step, and their gradients travel back.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np


class Round(NamedTuple):
    """One exchange: stage `source` sends its block at `send[source]` to `target`, which
    puts it at `put[target]`; for who sends or gets nothing, there stands a block beyond
    the last."""

    pairs: tuple[tuple[int, int], ...]
    send: np.ndarray
    put: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Placement:
    """first, count: int32 [virtual, stages], repeats of each chunk. at_rest: repeats of
    a stage, padding included. rows: of a stage's chunks, `depth` for each virtual
    stage. block: repeats that travel together. rounds: the way from rest to the chunks;
    none where all are at home."""

    first: np.ndarray
    count: np.ndarray
    at_rest: int
    depth: int
    block: int
    rounds: tuple[Round, ...]

    @property
    def rows(self) -> int:
        return self.depth * len(self.count)

    @property
    def is_even(self) -> bool:
        return bool((self.count == self.depth).all())


def place(
    repeats: int,
    *,
    stages: int,
    virtual: int,
    size: int = 1,
    prefix: int = 0,
    suffix: int = 0,
) -> Placement:
    """Chunks as equal in layers as can be: `repeats` of `size` layers each, `prefix`
    layers before them and `suffix` after.

    Raises ValueError if there are fewer repeats than chunks.
    """
    chunks = stages * virtual
    if repeats < chunks:
        raise ValueError(
            f"{repeats} repeats do not give each of {stages} stages x {virtual} "
            "virtual stages one"
        )
    counts = _counts(repeats, chunks, size=size, prefix=prefix, suffix=suffix)
    firsts = [0, *itertools.accumulate(counts)][:-1]
    depth = max(counts)
    at_rest = -(-repeats // stages)
    block = math.gcd(at_rest, depth, *counts)
    moves = []  # (source, its block, target, its block)
    for c, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        v, s = divmod(c, stages)
        for r in range(0, count, block):
            home, row = divmod(first + r, at_rest)
            moves.append((home, row // block, s, (v * depth + r) // block))
    is_home = all(move[:2] == move[2:] for move in moves)
    return Placement(
        first=np.asarray(firsts, np.int32).reshape(virtual, stages),
        count=np.asarray(counts, np.int32).reshape(virtual, stages),
        at_rest=at_rest,
        depth=depth,
        block=block,
        rounds=() if is_home and at_rest == virtual * depth else _rounds(moves, stages),
    )


def _counts(
    repeats: int, chunks: int, *, size: int, prefix: int, suffix: int
) -> list[int]:
    """Repeats of each chunk: one each, then each to the chunk with the fewest layers,
    of several the first."""
    counts = [1] * chunks
    extra = [0] * chunks
    extra[0] += prefix
    extra[-1] += suffix
    for _ in range(repeats - chunks):
        loads = [size * n + more for n, more in zip(counts, extra, strict=True)]
        counts[loads.index(min(loads))] += 1
    return counts


def _rounds(moves: list[tuple[int, int, int, int]], stages: int) -> tuple[Round, ...]:
    """Every move in the first round in which its source sends nothing yet and its
    target gets nothing."""
    rounds: list[list[tuple[int, int, int, int]]] = []
    for move in moves:
        for others in rounds:
            if all(move[0] != o[0] and move[2] != o[2] for o in others):
                others.append(move)
                break
        else:
            rounds.append([move])
    beyond_send = 1 + max(move[1] for move in moves)
    beyond_put = 1 + max(move[3] for move in moves)
    made = []
    for chosen in rounds:
        send = np.full(stages, beyond_send, np.int32)
        put = np.full(stages, beyond_put, np.int32)
        for source, row, target, place_there in chosen:
            send[source], put[target] = row, place_there
        pairs = tuple((source, target) for source, _, target, _ in chosen)
        made.append(Round(pairs, send, put))
    return tuple(made)
