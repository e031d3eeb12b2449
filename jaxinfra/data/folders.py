"""The files of a data set by their names, where they are: on this machine.

`remote_folder` has the same words for URLs. Whatever is wrong is a DataError that names
the file.
"""

import functools
import hashlib
import pathlib
from typing import Any, Protocol

import numpy as np
import xxhash

import jaxinfra
from jaxinfra.config import DataError
from jaxinfra.data.windows import BLOCK_BYTES, LocalWindows, Report, Windows

_READ_BYTES = 4 * 2**20


class Folder(Protocol):
    """What a data set is opened from; its text is what people call it by."""

    eager_shards: int  # up to so many shards are opened at once, and stay open
    open_shards: int  # of more, so many stay open

    @property
    def path(self) -> pathlib.Path | str: ...

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        ...

    def array(
        self, name: str, dtype: np.dtype, shape: tuple[int, ...], checksum: str
    ) -> np.ndarray:
        """A .npy file that must hold just this, whose bytes are checked now."""
        ...

    def windows(
        self,
        name: str,
        dtype: np.dtype,
        size: int,
        sums_K: np.ndarray,
        report: Report | None,
    ) -> Windows:
        """A .npy file [size], whose bytes are checked by `sums_K` as they are read."""
        ...

    def checksum(self, name: str) -> str:
        """Hex xxh3_128 of a file."""
        ...


def as_folder(folder: str | pathlib.Path | Folder) -> Folder:
    """A path's folder, a URL's, or a folder as it is."""
    if isinstance(folder, str) and "://" in folder:
        # By its public name, which loads the module: a local folder needs none of it.
        return jaxinfra.RemoteFolder(folder)
    is_path = isinstance(folder, str | pathlib.Path)
    return LocalFolder(pathlib.Path(folder)) if is_path else folder


class LocalFolder:
    """A folder of this machine, its arrays memory-mapped."""

    eager_shards = 1_000
    open_shards = 4_096  # Linux lets a process map 65,530 files

    def __init__(self, path: pathlib.Path):
        self._path = path

    @property
    def path(self) -> pathlib.Path:
        return self._path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def array(
        self, name: str, dtype: np.dtype, shape: tuple[int, ...], checksum: str
    ) -> np.ndarray:
        array = _mapped(self.path / name, dtype, shape)
        if (found := self.checksum(name)) != checksum:
            raise DataError(
                f"{name} has checksum {found}, not {checksum}; restore "
                f"{self.path / name} or prepare the data set again"
            )
        return array

    def windows(
        self,
        name: str,
        dtype: np.dtype,
        size: int,
        sums_K: np.ndarray,
        report: Report | None,
    ) -> Windows:
        path = self.path / name
        array_N = _mapped(path, dtype, (size,))
        return LocalWindows(array_N, sums_K=sums_K, path=path, report=report)

    def checksum(self, name: str) -> str:
        return file_xxh3_128(self.path / name)


def npy_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of the header of a .npy file that `writer` wrote, and of the whole file."""
    values = int(np.prod(shape)) * dtype.itemsize
    header = _header_bytes(dtype, shape)
    return header, header + values


def num_blocks(dtype: np.dtype, size: int) -> int:
    """Sums of a file of `size` items."""
    return -(-npy_bytes(dtype, (size,))[1] // BLOCK_BYTES)


def block_sums(path: pathlib.Path) -> np.ndarray:
    """uint64 [K]: xxh3 of every `BLOCK_BYTES` of a file."""
    with path.open("rb") as file:
        blocks = iter(functools.partial(file.read, BLOCK_BYTES), b"")
        return np.fromiter(map(xxhash.xxh3_64_intdigest, blocks), np.uint64)


def file_sha256(path: pathlib.Path) -> str:
    """Hex sha256 of the bytes of a file: what names a text. Raises DataError."""
    return _file_hex(path, hashlib.sha256())


def file_xxh3_128(path: pathlib.Path) -> str:
    """Hex xxh3_128 of the bytes of a file: notices damage, at 16 GB/s a core. Raises
    DataError."""
    return _file_hex(path, xxhash.xxh3_128())


def _header_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    counted = _Counter()
    np.lib.format.write_array_header_1_0(counted, header)  # pyright: ignore
    return counted.num_bytes


class _Counter:
    def __init__(self):
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        self.num_bytes += len(data)


def _mapped(path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header raises anything, TokenError too
        raise DataError(f"{path} cannot be read ({error}); restore the file") from error
    is_whole = path.stat().st_size == array.offset + array.nbytes
    if array.dtype != dtype or array.shape != shape or not is_whole:
        raise DataError(
            f"{path} holds {array.dtype.name}{list(array.shape)} in "
            f"{path.stat().st_size} bytes; dataset.json says "
            f"{dtype.name}{list(shape)}: restore the file or prepare it again"
        )
    return np.asarray(array)


def _file_hex(path: pathlib.Path, state: Any) -> str:
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                state.update(piece)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; "
            "check the file, its permissions and its disk"
        ) from error
    return state.hexdigest()
