"""safetensors files, read and written a tensor at a time.

A folder holds `model.safetensors`, or several files and `model.safetensors.index.json`.
All that a header or an index says is checked before a byte is believed. Format: 8 bytes
of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
Source: github.com/huggingface/safetensors, README, "Format".
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxinfra.config import DataError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # as the transformers library cuts them

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Of buffers, which are no parameters and are passed over.
_BUFFERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or its rows start .. stop of the first dim, in its own dtype."""
        shape, offset = self.shape, self.offset
        if shape:
            row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
            stop = shape[0] if stop is None else stop
            shape, offset = (stop - start, *shape[1:]), offset + start * row_bytes
        array = np.empty(shape, self.dtype)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            view, filled = array.reshape(-1).view(np.uint8), 0
            while filled < view.size:
                count = stream.readinto(view[filled:])
                if not count:
                    raise _damaged(self.file, "ended while it was read")
                filled += count
        return array


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of the folder by name, headers read and checked.

    Raises DataError that names the file and what is wrong with it.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise DataError(_no_weights(folder))
        return open_file(folder / WEIGHTS)
    places = _read_index(index)
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        in_file = open_file(folder / name)
        if extra := sorted(t for t in in_file if places.get(t) != name):
            raise DataError(
                f"{folder / name} holds {extra[0]!r}, which {INDEX} does not place "
                "there; download the folder again"
            )
        found |= in_file
    if missing := sorted(places.keys() - found.keys()):
        raise DataError(
            f"{index} says that {missing[0]!r} is in {places[missing[0]]}, which does "
            "not hold it; download the folder again"
        )
    return found


def open_file(file: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of one file by name."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise _damaged(file, "is cut off, or no safetensors file")
            header = json.loads(stream.read(length))
        return dict(_checked_header(file, header, 8 + length, size))
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror or error}; restore the file"
        ) from error
    except (ValueError, RecursionError, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(file, f"has no readable header ({error})") from error


class Writing(NamedTuple):
    """A tensor to be written: its bytes are made when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Any  # () -> np.ndarray of that dtype and shape


def write_folder(
    folder: pathlib.Path, tensors: list[Writing], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes files of at most `shard_bytes` unless one tensor is larger, with an index
    where there are several; at most one tensor is in memory."""
    groups: list[list[Writing]] = [[]]
    for tensor in tensors:
        if groups[-1] and _num_bytes([*groups[-1], tensor]) > shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    names = [WEIGHTS]
    if len(groups) > 1:
        total = len(groups)
        names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    for name, group in zip(names, groups, strict=True):
        _write_file(folder / name, group)
    if len(groups) > 1:
        places = {
            tensor.name: name
            for name, group in zip(names, groups, strict=True)
            for tensor in group
        }
        index = {"metadata": {"total_size": _num_bytes(tensors)}, "weight_map": places}
        with (folder / INDEX).open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(index, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _write_file(file: pathlib.Path, tensors: list[Writing]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _num_bytes([tensor])
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.make(), tensor.dtype)
            assert array.shape == tensor.shape, (tensor.name, array.shape)
            stream.write(array.reshape(-1).view(np.uint8))
        stream.flush()
        os.fsync(stream.fileno())


def _num_bytes(tensors: Iterable[Writing]) -> int:
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)


def _checked_header(
    file: pathlib.Path, header: Any, start: int, size: int
) -> Iterator[tuple[str, Stored]]:
    """(name, place) of each tensor: together they fill the file, none overlaps."""
    if not isinstance(header, dict):
        raise _damaged(file, "has a header that is no JSON object")
    header.pop("__metadata__", None)
    end = 0
    records = sorted(header.items(), key=lambda item: _offsets(file, *item))
    for name, record in records:
        begin, stop = _offsets(file, name, record)
        kind, shape = str(record.get("dtype")), record.get("shape")
        if begin != end:
            raise _damaged(file, f"has a gap or overlapping data at {name!r}")
        end = stop
        if kind in _BUFFERS:
            continue
        if kind not in _DTYPES:
            raise DataError(
                f"{file} holds {name!r} as {kind}, which is not read; convert it to "
                f"one of {', '.join(_DTYPES)}"
            )
        dtype = _DTYPES[kind]
        is_shape = isinstance(shape, list) and all(
            type(n) is int and n >= 0 for n in shape
        )
        if not is_shape or stop - begin != math.prod(shape) * dtype.itemsize:
            raise _damaged(file, f"says {record} of {name!r}, which is no size")
        yield name, Stored(file, dtype, tuple(shape), start + begin)
    if start + end != size:
        raise _damaged(
            file, f"holds {size} bytes and its header says {start + end}: it is cut off"
        )


def _offsets(file: pathlib.Path, name: str, record: Any) -> tuple[int, int]:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        begin, stop = record["data_offsets"]
        if type(begin) is int and type(stop) is int and 0 <= begin <= stop:
            return begin, stop
    raise _damaged(file, f"has no place for {name!r}")


def _read_index(index: pathlib.Path) -> Mapping[str, str]:
    """Tensor -> file name, each the plain name of a file beside the index."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(name, file) for name, file in places.items()]
    except (
        OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError,
    ) as error:  # fmt: skip
        raise DataError(
            f"{index} is no index of tensors ({error!r:.200}); download it again"
        ) from error
    for name, file in pairs:
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise DataError(
                f"{index} places {name!r} in {file!r}; a file must be one beside the "
                "index, named like model-00001-of-00002.safetensors"
            )
    return dict(pairs)


def _damaged(file: pathlib.Path, what: str) -> DataError:
    return DataError(f"{file} {what}; download or convert it again")


def _no_weights(folder: pathlib.Path) -> str:
    pickled = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    if pickled:
        return (
            f"{folder} has its weights in {pickled[0]}, which is a pickle and is not "
            "opened; save the model again as safetensors"
        )
    return f"{folder} has neither {WEIGHTS} nor {INDEX}; give the folder of a model"
