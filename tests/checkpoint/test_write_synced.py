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
@pytest.mark.parametrize("call", ["fcntl", "write"])
def test_a_file_system_that_cannot_is_written_through_its_cache(
    tmp_path, monkeypatch, call
):
    module = {"fcntl": fcntl, "write": os}[call]
    kept, refused = getattr(module, call), []
    get_flags = fcntl.fcntl

    def refuse(file, *args):
        is_set = call == "fcntl" and args[0] == fcntl.F_SETFL
        flags = args[1] if is_set else get_flags(file, fcntl.F_GETFL)
        if flags & commits._DIRECT:
            refused.append(flags)
            raise OSError(errno.EINVAL, "Invalid argument")
        return kept(file, *args)

    data = os.urandom(BLOCK + 4100)
    with monkeypatch.context() as patch:
        patch.setattr(module, call, refuse)
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
