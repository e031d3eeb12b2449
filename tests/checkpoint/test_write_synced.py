"""Files written past the page cache, and where the file system cannot do that."""

import errno
import fcntl
import itertools
import os

import pytest

from jaxinfra.checkpoint import commits

BLOCK = commits._BLOCK_BYTES
DIRECT = pytest.mark.skipif(not commits._DIRECT, reason="no O_DIRECT here")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, BLOCK, BLOCK + 5, 2 * BLOCK])
@pytest.mark.parametrize("cut", [7, 3000, 2**21 - 1])
def test_a_file_is_its_pieces(tmp_path, size, cut):
    data = os.urandom(size)
    cuts = sorted({0, min(cut, size), size})
    pieces = [data[a:b] for a, b in itertools.pairwise(cuts)]
    commits.write_synced(tmp_path / "below" / "file", pieces)
    assert (tmp_path / "below" / "file").read_bytes() == data


@DIRECT
@pytest.mark.parametrize("strict", ["open", "write"])
def test_a_file_system_that_cannot_is_written_through_its_cache(
    tmp_path, monkeypatch, strict
):
    kept, refused = getattr(os, strict), []

    def refuse(target, *args, **kwargs):
        is_open = strict == "open"
        flags = args[0] if is_open else fcntl.fcntl(target, fcntl.F_GETFL)
        if flags & commits._DIRECT:
            refused.append(flags)
            raise OSError(errno.EINVAL, "Invalid argument")
        return kept(target, *args, **kwargs)

    data = os.urandom(BLOCK + 4100)
    with monkeypatch.context() as patch:
        patch.setattr(os, strict, refuse)
        commits.write_synced(tmp_path / "file", [data])
    assert len(refused) == 1
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_real_error_is_raised(tmp_path, monkeypatch, call):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="Input/output"):
            commits.write_synced(tmp_path / "file", [b"some"])


def test_short_writes_lose_nothing(tmp_path, monkeypatch):
    write = os.write
    data = os.urandom(BLOCK + 10)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda f, view: write(f, view[:1000]))
        commits.write_synced(tmp_path / "file", [data])
    assert (tmp_path / "file").read_bytes() == data
