"""Files of the idx format: what was written is read, and nothing else is taken."""

import gzip
import struct

import numpy as np
import pytest

from jaxinfra.config import DataError
from jaxinfra.data import idx


def idx_bytes(array, code):
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize(
    ("code", "dtype"), [(8, "u1"), (9, "i1"), (11, "i2"), (12, "i4"), (13, "f4")]
)
@pytest.mark.parametrize("name", ["a.idx", "a.gz"])
def test_what_was_written_is_read(tmp_path, code, dtype, name):
    array = np.arange(-12, 12).astype(dtype).reshape(2, 3, 4)
    data = idx_bytes(array, code)
    (tmp_path / name).write_bytes(gzip.compress(data) if name == "a.gz" else data)
    found = idx.read(tmp_path / name, num_dims=3)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, array)


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no idx file"),
        (b"\x89PNG" + GOOD, "no idx file: it begins with 89504e47"),
        (b"\0\0\x07" + GOOD[3:], "no idx file"),
        (b"\0\0\x08\x02" + GOOD[4:], "has 2 dims, and 3 are expected"),
        (GOOD[:9], "ends in its header"),
        (GOOD[:-1], r"has 23 bytes of values where its dims \(2, 3, 4\) make 24"),
        (GOOD + b"\0", "has more bytes of values"),
        (struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3), "which cannot be"),
    ],
)
def test_a_file_that_is_not_whole_idx_is_refused(tmp_path, data, message):
    path = tmp_path / "a.idx"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        idx.read(path, num_dims=3)


def test_damaged_gzip_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "a.gz"
    with pytest.raises(DataError, match="there is no file"):
        idx.read(path, num_dims=3)
    whole = bytearray(gzip.compress(GOOD, mtime=0))
    for damaged in (whole[:-9], whole[:14] + b"\xff\xff" + whole[16:], b"plain"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot be read .* fetch it again"):
            idx.read(path, num_dims=3)
