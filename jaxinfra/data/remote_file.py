"""Files of a data set by URL, read in blocks that are checked and kept by a cache.

A large file is covered by sums: xxh3_64 of each `block_bytes` of it, the last block
shorter. The sums come with the data set and say what every byte must be, wherever it
was meanwhile: bytes with another sum are fetched again, and at last refused. They also
name the blocks in the cache, so that a copy of the data set, or a URL that was signed
anew, finds what is there.
"""

import functools
import re
from collections.abc import Callable, Iterable

import numpy as np
import xxhash

from jaxinfra.config import DataError
from jaxinfra.data import storage, urls
from jaxinfra.data.block_cache import BlockCache
from jaxinfra.data.patience import PATIENCE, Patience
from jaxinfra.data.read_ahead import ReadAhead
from jaxinfra.data.windows import BLOCK_BYTES

_TRIES = 3  # of bytes that come with another sum
_XXH3_128 = re.compile(r"[0-9a-f]{32}")


class DamagedError(DataError):
    """Bytes that came, and are not those that were written."""


def block_sums(data: bytes, block_bytes: int = BLOCK_BYTES) -> np.ndarray:
    """uint64 [K]: the sums of the blocks of a file, for `RemoteFile`."""
    view = memoryview(data)
    starts = range(0, len(data), block_bytes)
    sums = [xxhash.xxh3_64_intdigest(view[i : i + block_bytes]) for i in starts]
    return np.array(sums, np.uint64)


class RemoteFile:
    """A file of `size_bytes` whose blocks have the sums `sums_K`, uint64.

    Raises DataError where the number of sums is not that of the blocks. Threads may
    call all of it at once; a block is fetched once.
    """

    def __init__(
        self,
        url: str,
        size_bytes: int,
        sums_K: np.ndarray,
        cache: BlockCache,
        block_bytes: int = BLOCK_BYTES,
        *,
        patience: Patience = PATIENCE,
        ahead: ReadAhead | None = None,
    ):
        num_blocks = -(-size_bytes // block_bytes)
        if sums_K.shape != (num_blocks,) or sums_K.dtype != np.uint64:
            raise DataError(
                f"{urls.redacted(url)} has {num_blocks} blocks of {block_bytes} bytes, "
                f"and its sums are {sums_K.dtype.name}{list(sums_K.shape)}; prepare "
                "the data set again"
            )
        self.url, self.size_bytes, self.block_bytes = url, size_bytes, block_bytes
        self._sums_K = sums_K
        self._cache = cache
        self._patience = patience
        layout = f"{size_bytes}/{block_bytes}/".encode()
        self._name = xxhash.xxh3_128_hexdigest(layout + sums_K.tobytes())
        self._ahead = ahead or ReadAhead()

    def read(self, start: int, stop: int) -> np.ndarray:
        """uint8 [stop - start], read-only: a view of one block, or a copy of several.

        Raises DataError for bytes that do not come, or come wrong; IndexError for
        places that are not in the file.
        """
        if not 0 <= start <= stop <= self.size_bytes:
            raise IndexError(f"{start} to {stop} is not in 0 .. {self.size_bytes}")
        first, last = (
            start // self.block_bytes,
            max(start, stop - 1) // self.block_bytes,
        )
        if start == stop:
            return np.empty(0, np.uint8)
        begin = first * self.block_bytes
        if first == last:
            return self._block(first)[start - begin : stop - begin]
        parts = [self._block(number) for number in range(first, last + 1)]
        return np.concatenate(parts)[start - begin : stop - begin]

    def read_ahead(self, blocks: Iterable[int]) -> None:
        """Fetches blocks, by number, in other threads; those that are too many are left
        out, and what goes wrong is not told before the block is read."""
        for number in blocks:
            name = self._name_of(number)
            if self._cache.holds(name):
                continue
            if not self._ahead.begin(name, functools.partial(self._block, number)):
                return

    def _name_of(self, number: int) -> str:
        return f"{self._name}-{number}"

    def _block(self, number: int) -> np.ndarray:
        start = number * self.block_bytes
        stop = min(start + self.block_bytes, self.size_bytes)
        expected = int(self._sums_K[number])

        def is_right(data: bytes) -> bool:
            is_whole = len(data) == stop - start
            return is_whole and xxhash.xxh3_64_intdigest(data) == expected

        def fetch() -> bytes:
            read = storage.read_bytes
            return _checked(
                lambda: read(self.url, start, stop, patience=self._patience),
                is_right,
                f"{urls.redacted(self.url)}: block {number} (bytes {start} to {stop})",
            )

        return self._cache.get(self._name_of(number), fetch, is_right)


def cached_file(
    url: str, checksum: str, cache: BlockCache, *, patience: Patience = PATIENCE
) -> bytes:
    """All bytes of a small file, whose hex xxh3_128 is `checksum`. Raises DataError."""
    if not _XXH3_128.fullmatch(checksum):
        raise DataError(
            f"{urls.redacted(url)} has the checksum {checksum!r:.80}, not 32 digits "
            "0-9 and a-f; prepare the data set again"
        )

    def is_right(data: bytes) -> bool:
        return xxhash.xxh3_128_hexdigest(data) == checksum

    def fetch() -> bytes:
        read = storage.read_bytes
        return _checked(
            lambda: read(url, patience=patience), is_right, urls.redacted(url)
        )

    return cache.get(f"{checksum}-file", fetch, is_right).tobytes()


def _checked(
    read: Callable[[], bytes], is_right: Callable[[bytes], bool], what: str
) -> bytes:
    for _ in range(_TRIES):
        data = read()
        if is_right(data):
            return data
    raise DamagedError(
        f"{what} came {_TRIES} times with another checksum than the data set has for "
        "it; it is damaged: upload it again, or prepare it again"
    )
