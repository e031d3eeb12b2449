"""Rows of whole documents, laid out so that a row is one slice of the tokens.

Planned when a data set is prepared, for rows of T tokens, which hold T + 1:

    documents    every row holds one document
    first_fit    documents in order, each into the first row that has room for it
    best_fit     the longest first, each into the row that it leaves least room in

A document longer than a row fills rows of its own, T apart as in `concat`, so that each
of its tokens but the first is a target once; what is left of it may begin a row with
others. A unit is what must lie together on disk: such a document and those that share
its last row, or the documents of one row: at most one for every 32 tokens of a row, or
16, since what tells documents apart has room for as many in every row.

Source of best fit: H. Ding et al., "Fewer Truncations Improve Language Modeling", ICML
2024, which finds fewer made-up facts where documents are not cut.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np


class Plan(NamedTuple):
    """units: documents that lie together, by number, each a list in its order. rows
    [R, 2]: (start, stop) in the tokens of all units one after another, rows of unit u
    before those of unit u + 1; None: any window is a row."""

    units: Any  # a list of lists, or int64 [D, 1]
    tokens_U: np.ndarray  # of each unit
    rows_R2: np.ndarray | None

    def cut(self, shard_tokens: int) -> Iterator[slice]:
        """Units of each shard: at most `shard_tokens` tokens, or one unit."""
        start = tokens = 0
        for stop, size in enumerate(self.tokens_U.tolist()):
            if stop > start and tokens + size > shard_tokens:
                yield slice(start, stop)
                start, tokens = stop, 0
            tokens += size
        if start < len(self.units):
            yield slice(start, len(self.units))

    def part(self, here: slice) -> tuple[list[int], np.ndarray | None]:
        """(documents, rows in their tokens) of some consecutive units."""
        documents = [d for unit in self.units[here] for d in unit]
        if self.rows_R2 is None:
            return documents, None
        start = int(self.tokens_U[: here.start].sum())
        stop = start + int(self.tokens_U[here].sum())
        first, last = np.searchsorted(self.rows_R2[:, 0], [start, stop])
        return documents, self.rows_R2[first:last] - start


def plan(lengths_D: np.ndarray, *, name: str, length: int) -> Plan:
    """The rows of documents with these tokens each, int64 [D]; `name` as above, or
    concat, which keeps them as they are."""
    if name == "concat":
        return Plan(np.arange(len(lengths_D))[:, None], lengths_D, None)
    rest_D = _rest(lengths_D, length)
    units = PACKINGS[name](rest_D, lengths_D > length + 1, length + 1)
    return _with_rows(units, lengths_D, length)


def padding_fraction(rows_R2: np.ndarray, *, length: int) -> float:
    """The part of all rows that is filled up."""
    filled = int((rows_R2[:, 1] - rows_R2[:, 0]).sum())
    return 1 - filled / max(len(rows_R2) * (length + 1), 1)


def _rest(lengths_D: np.ndarray, length: int) -> np.ndarray:
    """Tokens of each document that are not in rows of its own; 0: none is left to
    predict."""
    rest_D = lengths_D - _num_own(lengths_D, length) * length
    is_done = (lengths_D > length + 1) & (rest_D < 2)
    return np.where(is_done, 0, rest_D)


def _num_own(lengths_D: np.ndarray, length: int) -> np.ndarray:
    """Whole rows that a document too long for one fills alone."""
    return np.where(lengths_D > length + 1, (lengths_D - 1) // length, 0)


def _documents(rest_D: np.ndarray, is_long_D: np.ndarray, room: int) -> list[list[int]]:
    return [[d] for d in range(len(rest_D))]


def _first_fit(rest_D: np.ndarray, is_long_D: np.ndarray, room: int) -> list[list[int]]:
    units: list[list[int]] = []
    most = _most_documents(room)
    # Trees of the most room in any unit below each node: of all, and of those that a
    # long document may still begin.
    leaves = 1 << max(len(rest_D) - 1, 1).bit_length()
    any_tree, new_tree = [0] * (2 * leaves), [0] * (2 * leaves)
    for d, (size, is_long) in enumerate(zip(rest_D.tolist(), is_long_D.tolist())):
        unit = _first(new_tree if is_long else any_tree, size) if size else len(units)
        if unit is None:
            unit = len(units)
        if unit == len(units):
            units.append([])
            left = room - size if size else 0
            head = is_long
        else:
            left = any_tree[leaves + unit] - size
            head = is_long or new_tree[leaves + unit] == 0
        units[unit] = [d, *units[unit]] if is_long else [*units[unit], d]
        left = left if len(units[unit]) < most else 0
        _set(any_tree, leaves + unit, left)
        _set(new_tree, leaves + unit, 0 if head else left)
    return units


def _first(tree: list[int], size: int) -> int | None:
    """The first leaf that holds at least `size`."""
    if tree[1] < size:
        return None
    node, leaves = 1, len(tree) // 2
    while node < leaves:
        node *= 2
        node += tree[node] < size
    return node - leaves


def _set(tree: list[int], node: int, value: int) -> None:
    tree[node] = value
    while node > 1:
        node //= 2
        value = max(tree[2 * node], tree[2 * node + 1])
        if tree[node] == value:
            return
        tree[node] = value


def _best_fit(rest_D: np.ndarray, is_long_D: np.ndarray, room: int) -> list[list[int]]:
    units: list[list[int]] = []
    most = _most_documents(room)
    # By whether a long document begins them: units by the room left, and a bit for each
    # room that some unit has.
    by_room = [[[] for _ in range(room + 1)] for _ in range(2)]
    has_room = [0, 0]
    order_D = np.argsort(-rest_D, kind="stable")
    for d in order_D.tolist():
        size, is_long = int(rest_D[d]), bool(is_long_D[d])
        best, rooms = None, [0, 0]
        if size:
            lowest = [(bits >> size) << size for bits in has_room]
            rooms = [(bits & -bits).bit_length() - 1 for bits in lowest]
            kinds = [k for k in (1, 0) if rooms[k] >= 0 and not (k and is_long)]
            best = min(kinds, key=rooms.__getitem__, default=None)
        if best is None:
            unit, left, head = len(units), room - size if size else 0, is_long
            units.append([d])
        else:
            at = rooms[best]
            unit = by_room[best][at].pop()
            if not by_room[best][at]:
                has_room[best] &= ~(1 << at)
            left, head = at - size, is_long or best == 1
            units[unit] = [d, *units[unit]] if is_long else [*units[unit], d]
        if left and len(units[unit]) < most:
            by_room[head][left].append(unit)
            has_room[head] |= 1 << left
    return units


def _most_documents(room: int) -> int:
    return max(room // 32, 16)


PACKINGS: dict[str, Callable[[np.ndarray, np.ndarray, int], list[list[int]]]] = {
    "documents": _documents,
    "first_fit": _first_fit,
    "best_fit": _best_fit,
}


def _with_rows(units: list[list[int]], lengths_D: np.ndarray, length: int) -> Plan:
    sizes_U = np.fromiter((len(u) for u in units), np.int64, len(units))
    laid_D = np.fromiter((d for u in units for d in u), np.int64, len(lengths_D))
    heads_U = np.cumsum(sizes_U) - sizes_U
    tokens_U = np.add.reduceat(lengths_D[laid_D], heads_U)
    starts_U = np.cumsum(tokens_U) - tokens_U
    # Only the first document of a unit can be too long for a row.
    own_U = _num_own(lengths_D[laid_D[heads_U]], length)
    rest_U = starts_U + own_U * length
    stops_U = starts_U + tokens_U
    has_rest_U = stops_U - rest_U >= 2
    unit_R = np.repeat(np.arange(len(units)), own_U + has_rest_U)
    number_R = np.arange(unit_R.size) - np.searchsorted(unit_R, unit_R)
    start_R = starts_U[unit_R] + number_R * length
    stop_R = np.where(number_R < own_U[unit_R], start_R + length + 1, stops_U[unit_R])
    return Plan(units, tokens_U, np.stack([start_R, stop_R], axis=1))
