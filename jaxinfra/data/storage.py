"""Files by URL: their bytes, their sizes, their names.

`urls` names the schemes, `filesystems` says where credentials come from, `patience`
what is tried again and for how long. Every function raises DataError, which shows no
credentials. Limits: a file that is replaced while it is read gives bytes of both; a
data set's checksums notice, a stream of text does not.
"""

import dataclasses
import io
import pathlib
import tempfile
from typing import Any, BinaryIO

from jaxinfra.config import DataError
from jaxinfra.data import urls
from jaxinfra.data.filesystems import place_of
from jaxinfra.data.patience import PATIENCE, Patience

STREAM_BYTES = 8 * 2**20  # of one request of a stream
_SHORT_TRIES = 3

# What changes with a file: of S3 and the web, GCS, HDFS.
_VERSION_KEYS = ("ETag", "etag", "LastModified", "generation", "modificationTime")


@dataclasses.dataclass(frozen=True)
class Url:
    """A file where a path may stand too; written without what is secret in it."""

    url: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return urls.redacted(self.url)

    @property
    def name(self) -> str:
        return pathlib.PurePosixPath(urls.path_of(self.url)).name

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.name).suffix

    def with_suffix(self, suffix: str) -> pathlib.PurePosixPath:
        return pathlib.PurePosixPath(self.name).with_suffix(suffix)

    def open(self, mode: str = "rb") -> BinaryIO:
        return open_stream(self.url)


def size(url: str, *, patience: Patience = PATIENCE) -> int | None:
    """Bytes of a file; None where a web server does not say. Raises DataError."""
    return patience.until_done(url, lambda: place_of(url).info()["size"])


def state(url: str, *, patience: Patience = PATIENCE) -> tuple[int | str, ...]:
    """Bytes of a file, 0 where a web server does not say, its URL, and what its server
    says of its version. Raises DataError."""
    info = patience.until_done(url, lambda: place_of(url).info())
    version = [str(info.get(key, "")) for key in _VERSION_KEYS]
    return (info["size"] or 0, url, *version)


def list_files(url: str, *, patience: Patience = PATIENCE) -> list[str]:
    """URLs of the files that one names, sorted: its own, those directly in a folder, or
    those of a glob; none if it names nothing.

    A web server's folder ends with a slash, and its page links its files. Raises
    DataError if the server refuses.
    """

    def found() -> list[str]:
        place = place_of(url)
        if urls.is_glob(url):
            records = place.fs.glob(place.path, detail=True).values()
        elif place.is_file():
            return [url]
        else:
            records = place.fs.ls(place.path, detail=True)
        files = (r["name"] for r in records if r["type"] == "file")
        return sorted(place.prefix + name for name in files)

    return patience.until_done(url, found)


def read_bytes(
    url: str,
    start: int | None = None,
    stop: int | None = None,
    *,
    patience: Patience = PATIENCE,
) -> bytes:
    """The bytes [start, stop) of a file, or all of it.

    Raises DataError if it cannot be read, or does not hold or serve that range.
    """
    if start is None or stop is None:
        if start is not None or stop is not None:
            raise ValueError("give both start and stop, or neither")
        return patience.until_done(url, lambda: place_of(url).read())
    if start == stop:
        return b""
    found = b""
    for _ in range(_SHORT_TRIES):  # a connection that was cut can look like an end
        found = patience.until_done(url, lambda: place_of(url).read_range(start, stop))
        if len(found) == stop - start:
            return found
    raise DataError(
        f"{urls.redacted(url)} gives {len(found)} bytes, not {stop - start}, from byte "
        f"{start} on; it was cut off or changed: upload it again"
    )


def open_stream(url: str, *, patience: Patience = PATIENCE) -> BinaryIO:
    """A file to read and seek in, by ranges that are each tried again.

    From a web server that serves no ranges it is copied to a temporary file first.
    Raises DataError, when it is read too.
    """
    num_bytes = size(url, patience=patience)
    if url.startswith("http") and num_bytes != 0:
        try:
            read_bytes(url, 0, 1, patience=patience)
        except DataError:
            num_bytes = None
    if num_bytes is not None:
        raw = _Ranges(url, num_bytes, patience)
        return io.BufferedReader(raw, buffer_size=STREAM_BYTES)
    file = tempfile.TemporaryFile()  # noqa: SIM115

    def copy() -> None:
        file.seek(0)
        file.truncate()
        place = place_of(url)
        place.fs.get_file(place.path, file)

    patience.until_done(url, copy)
    file.seek(0)
    return file


def open_ranges(url: str, stop: int, *, buffer_bytes: int = STREAM_BYTES) -> BinaryIO:
    """The bytes of a file up to `stop`, no more than there are, to read and seek in: by
    ranges of at least `buffer_bytes`, which its server must serve."""
    return io.BufferedReader(_Ranges(url, stop, PATIENCE), buffer_size=buffer_bytes)


class _Ranges(io.RawIOBase):
    """A file by URL; `io.BufferedReader` chooses the ranges."""

    def __init__(self, url: str, num_bytes: int, patience: Patience):
        self._url, self._num_bytes, self._patience = url, num_bytes, patience
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._num_bytes)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = self._position
        stop = max(start, min(start + len(buffer), self._num_bytes))
        data = read_bytes(self._url, start, stop, patience=self._patience)
        buffer[: len(data)] = data
        self._position = stop
        return len(data)

    def readall(self) -> bytes:
        pieces = iter(lambda: self.read(STREAM_BYTES), b"")  # its own are of 8 KiB
        return b"".join(pieces)
