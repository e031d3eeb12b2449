"""Files of the idx format, in which MNIST and its kin come; plain or gzip.

Two zero bytes, a byte for the type, a byte for the number of dims, each dim as a
big-endian uint32, then the values. Source: yann.lecun.com/exdb/mnist. Imports no jax.
"""

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from jaxinfra.config import DataError

MAX_BYTES = 1 << 32  # of values: more is no image set, but a file that unpacks for ever
_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read(path: pathlib.Path, *, num_dims: int) -> np.ndarray:
    """The array of a file, of `num_dims` dims, in this machine's byte order.

    Raises DataError if the file is not there, is not idx, is damaged, has other dims,
    or ends before or after its values.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _DTYPES:
                raise DataError(f"{path} is no idx file: it begins with {start.hex()}")
            dtype, found = np.dtype(_DTYPES[start[2]]), start[3]
            if found != num_dims:
                raise DataError(f"{path} has {found} dims, and {num_dims} are expected")
            header = file.read(4 * num_dims)
            if len(header) < 4 * num_dims:
                raise DataError(f"{path} ends in its header; fetch it again")
            shape = struct.unpack(f">{num_dims}I", header)
            num_bytes = math.prod(shape) * dtype.itemsize
            if num_bytes > MAX_BYTES:
                raise DataError(f"{path} has dims {shape}, which cannot be")
            data = file.read(num_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    if len(data) != num_bytes:
        found = "more" if len(data) > num_bytes else f"{len(data)}"
        raise DataError(
            f"{path} has {found} bytes of values where its dims {shape} make "
            f"{num_bytes}; fetch it again"
        )
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
