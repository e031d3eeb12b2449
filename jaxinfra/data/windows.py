"""Windows of an array on disk, every byte checked before it is first used.

A file is covered by the 64-bit xxh3 of every block of `BLOCK_BYTES`. A window that is
read touches one or two blocks, and each is hashed the first time: the cost of one pass
over the data, spread over the first epoch, and none after it. What a damaged block does
is the caller's choice: an error, or a report, and windows that say that they are bad.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from jaxinfra.config import DataError

BLOCK_BYTES = 2**20

Report = Callable[[str], None]


class Taken(NamedTuple):
    """Windows [B, width], and which touch damage, bool [B]; None: none does."""

    items: np.ndarray
    is_damaged: np.ndarray | None = None


class Windows(Protocol):
    """An array that is read by windows, wherever it is."""

    @property
    def size(self) -> int: ...
    @property
    def dtype(self) -> np.dtype: ...
    def take(self, starts_B: np.ndarray, width: int) -> Taken:
        """Items starts .. starts + width of each; 0 beyond the end of the array."""
        ...

    def ahead(self, starts_B: np.ndarray, width: int) -> None:
        """These windows are taken soon."""
        ...

    def whole(self) -> np.ndarray:
        """All items [N], not checked."""
        ...


class LocalWindows:
    """Windows of a memory map, or of an array in memory, which has no sums."""

    def __init__(
        self,
        array_N: np.ndarray,
        *,
        sums_K: np.ndarray | None = None,
        path: pathlib.Path | None = None,
        report: Report | None = None,
    ):
        """`sums_K` of `folders.block_sums` of the file; `report` is told of damage,
        which without it is a DataError."""
        self._array, self._sums_K, self._path = array_N, sums_K, path
        self._report = report
        self._is_checked = np.zeros(0 if sums_K is None else len(sums_K), bool)
        self._num_unchecked = self._is_checked.size
        self._damaged: list[int] = []
        self.size, self.dtype = array_N.size, array_N.dtype
        self._view = functools.lru_cache(maxsize=4)(self._make_view)

    def ahead(self, starts_B: np.ndarray, width: int) -> None:
        """Nothing: the system reads ahead."""

    def whole(self) -> np.ndarray:
        return self._array

    def take(self, starts_B: np.ndarray, width: int) -> Taken:
        """As `Windows.take`; raises DataError for damage that nobody is told of."""
        is_damaged = None
        if self._num_unchecked or self._damaged:
            is_damaged = self._check(starts_B, width)
        view, last = self._view(width), self.size - width
        if not starts_B.size or starts_B.max() <= last:
            return Taken(view[starts_B], is_damaged)
        items = view[np.minimum(starts_B, max(last, 0))]
        for b in np.flatnonzero(starts_B > last):  # the ends of shards
            rest = self._array[starts_B[b] : starts_B[b] + width]
            items[b, : rest.size], items[b, rest.size :] = rest, 0
        return Taken(items, is_damaged)

    def _make_view(self, width: int) -> np.ndarray:
        """All windows, without a copy; one of zeros if the array is shorter."""
        if self.size < width:
            return np.zeros((1, width), self.dtype)
        return np.lib.stride_tricks.sliding_window_view(self._array, width)

    def _check(self, starts_B: np.ndarray, width: int) -> np.ndarray | None:
        """Hashes the blocks not seen before; which windows touch a damaged one."""
        bytes_B = starts_B * self._array.itemsize + self._header_bytes
        first_B = bytes_B // BLOCK_BYTES
        stops_B = bytes_B + width * self._array.itemsize
        last_B = np.minimum((stops_B - 1) // BLOCK_BYTES, self._is_checked.size - 1)
        span = int((last_B - first_B).max(initial=-1)) + 1
        touched = {k for d in range(span) for k in np.minimum(first_B + d, last_B)}
        for block in touched:
            if not self._is_checked[block]:
                self._check_block(int(block))
        if not self._damaged:
            return None
        bad = np.isin(np.arange(self._is_checked.size), self._damaged)
        bad_before = np.concatenate([[0], np.cumsum(bad)])
        return bad_before[last_B + 1] > bad_before[first_B]

    def _check_block(self, block: int) -> None:
        assert self._sums_K is not None
        size = BLOCK_BYTES
        data = self._file_bytes[block * size : (block + 1) * size]
        if xxhash.xxh3_64_intdigest(data) != int(self._sums_K[block]):
            stop = block * size + len(data)
            message = f"{self._path} is damaged between bytes {block * size} and {stop}"
            if self._report is None:
                raise DataError(
                    f"{message}; restore the file, prepare the data set again, or set "
                    "data.damaged=quarantine to go on without the rows there"
                )
            self._report(f"{message}; rows there count as padding")
            self._damaged.append(block)
        self._is_checked[block] = True
        self._num_unchecked -= 1

    @functools.cached_property
    def _file_bytes(self) -> memoryview:
        return memoryview(self._array.base._mmap)  # type: ignore[union-attr]

    @functools.cached_property
    def _header_bytes(self) -> int:
        return len(self._file_bytes) - self._array.nbytes
