"""Digests of JSON values and of files.

sha256 where a digest names something for ever; xxh3_128 (16 GB/s a core) where it only
has to notice damage. A file that cannot be read raises DataError.
"""

import hashlib
import json
import pathlib
from typing import Any

import xxhash

from jaxinfra.data.errors import DataError

_READ_BYTES = 4 * 2**20


def json_sha256(value: Any) -> str:
    """Hex sha256 of `value` as canonical JSON: sorted keys, no spaces, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_sha256(path: pathlib.Path) -> str:
    """Hex sha256 of the bytes of a file."""
    return _file_hex(path, hashlib.sha256())


def file_xxh3_128(path: pathlib.Path) -> str:
    """Hex xxh3_128 of the bytes of a file."""
    return _file_hex(path, xxhash.xxh3_128())


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
