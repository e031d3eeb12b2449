"""A data set behind a URL: `folders.Folder` over `remote_file`.

What is small is fetched when a shard is opened, tokens block by block as rows are read
and ahead of it; all of it stays in a cache on disk for the processes of this machine.
"""

import functools
import io
import pathlib
import re

import numpy as np
import xxhash

from jaxinfra import runfolder
from jaxinfra.config import Config, DataError
from jaxinfra.data import folders, storage, urls
from jaxinfra.data.block_cache import BlockCache
from jaxinfra.data.read_ahead import ReadAhead
from jaxinfra.data.remote_file import DamagedError, RemoteFile, cached_file
from jaxinfra.data.windows import BLOCK_BYTES, Report, Taken

MEMORY_BYTES = 256 * 2**20  # of blocks that rows are cut from
CACHE_BYTES = 50 * 2**30


class RemoteFolder:
    """A folder of S3, GCS, the web or HDFS, read through a cache on disk."""

    # Shards are opened when they are read: each costs some requests and some memory.
    eager_shards, open_shards = 0, 1_024

    def __init__(
        self,
        url: str,
        *,
        cache_dir: str | pathlib.Path = "",
        cache_bytes: int = CACHE_BYTES,
    ):
        """`cache_dir`: default as data.cache_dir. Raises DataError for a cache folder
        that cannot be."""
        self._url = url
        folder = pathlib.Path(cache_dir or runfolder.cache_dir(Config(name="data")))
        self._cache, self._ahead = _shared(folder / "blocks", cache_bytes)

    @property
    def path(self) -> str:
        return urls.redacted(self._url)

    def __str__(self) -> str:
        return self.path

    def read(self, name: str) -> bytes:
        return storage.read_bytes(self._file(name))

    def array(
        self, name: str, dtype: np.dtype, shape: tuple[int, ...], checksum: str
    ) -> np.ndarray:
        data = cached_file(self._file(name), checksum, self._cache)
        header, size = folders.npy_bytes(dtype, shape)
        try:
            whole = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # a header raises anything
            raise DataError(f"{self}/{name} is no array ({error})") from error
        if len(data) != size or (whole.dtype, whole.shape) != (dtype, shape):
            raise DataError(
                f"{self}/{name} holds {whole.dtype.name}{list(whole.shape)}; "
                f"dataset.json says {dtype.name}{list(shape)}: prepare it again"
            )
        return np.frombuffer(data, dtype, offset=header).reshape(shape)

    def windows(
        self,
        name: str,
        dtype: np.dtype,
        size: int,
        sums_K: np.ndarray,
        report: Report | None,
    ) -> "RemoteWindows":
        header, num_bytes = folders.npy_bytes(dtype, (size,))
        url, ahead = self._file(name), self._ahead
        file = RemoteFile(url, num_bytes, sums_K, self._cache, ahead=ahead)
        return RemoteWindows(file, dtype, size, header, report)

    def checksum(self, name: str) -> str:
        found = xxhash.xxh3_128()
        with storage.open_stream(self._file(name)) as file:
            while piece := file.read(storage.STREAM_BYTES):
                found.update(piece)
        return found.hexdigest()

    def _file(self, name: str) -> str:
        base, *query = re.split(r"(?=\?)", self._url, maxsplit=1)
        return "".join([base.rstrip("/"), "/", name, *query])


class RemoteWindows:
    """`windows.Windows` of a file by URL."""

    def __init__(
        self,
        file: RemoteFile,
        dtype: np.dtype,
        size: int,
        header_bytes: int,
        report: Report | None,
    ):
        self._file, self._header_bytes, self._report = file, header_bytes, report
        self.dtype, self.size = dtype, size
        self._told: set[str] = set()

    def take(self, starts_B: np.ndarray, width: int) -> Taken:
        """As `Windows.take`; raises DataError for what cannot be had, and for damage
        that nobody is told of."""
        items = np.zeros((len(starts_B), width), self.dtype)
        is_damaged = np.zeros(len(starts_B), bool)
        for b, start in enumerate(starts_B.tolist()):
            stop = min(start + width, self.size)
            try:
                items[b, : stop - start] = self._read(start, stop)
            except DamagedError as error:
                if self._report is None:
                    raise
                is_damaged[b] = True
                if str(error) not in self._told:
                    self._told.add(str(error))
                    self._report(f"{error}; rows there count as padding")
        return Taken(items, is_damaged if is_damaged.any() else None)

    def ahead(self, starts_B: np.ndarray, width: int) -> None:
        """Begins to fetch what these windows are cut from, in their order."""
        first_B = self._place(starts_B) // BLOCK_BYTES
        last_B = (
            self._place(np.minimum(starts_B + width, self.size)) - 1
        ) // BLOCK_BYTES
        blocks = dict.fromkeys(np.stack([first_B, last_B], axis=1).reshape(-1).tolist())
        self._file.read_ahead(blocks)

    def whole(self) -> np.ndarray:
        return self._read(0, self.size)

    def _read(self, start: int, stop: int) -> np.ndarray:
        first, last = self._place(start), self._place(stop)
        return self._file.read(int(first), int(last)).view(self.dtype)

    def _place(self, item: int | np.ndarray) -> int | np.ndarray:
        return self._header_bytes + item * self.dtype.itemsize


@functools.lru_cache
def _shared(folder: pathlib.Path, max_bytes: int) -> tuple[BlockCache, ReadAhead]:
    """Of all data sets of this process."""
    return BlockCache(folder, max_bytes, memory_bytes=MEMORY_BYTES), ReadAhead()
