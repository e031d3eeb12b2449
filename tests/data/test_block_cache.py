"""Blocks on disk for all processes of a host: whole, the latest, and not too many."""

import errno
import fcntl
import os
import pathlib
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxinfra.config import DataError
from jaxinfra.data.block_cache import BlockCache

SIZE = 1_000  # of a block


def block(number):
    return random.Random(number).randbytes(SIZE)


class Source:
    """Fetches blocks by number, and counts."""

    def __init__(self, cache):
        self.cache, self.fetched, self.pause_secs = cache, [], 0.0

    def get(self, number):
        def fetch():
            time.sleep(self.pause_secs)
            self.fetched.append(number)
            return block(number)

        return self.cache.get(f"b-{number}", fetch, lambda d: d == block(number))


def files(cache):
    return {p.name for p in cache.folder.glob("blocks/*")}


def bytes_on_disk(cache):
    with (cache.folder / "total").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return sum(p.stat().st_size for p in cache.folder.glob("blocks/*"))


@pytest.fixture
def make(tmp_path):
    def make(*, max_blocks=100, memory_blocks=0, **options):
        memory_bytes = memory_blocks * SIZE
        cache = BlockCache(
            tmp_path / "cache", max_blocks * SIZE, memory_bytes=memory_bytes, **options
        )
        return Source(cache)

    return make


def test_a_block_is_fetched_once_for_all_who_read_it(make):
    first = make()
    for _ in range(2):
        for number in range(5):
            found = first.get(number)
            assert found.tobytes() == block(number)
            assert not found.flags.writeable
    second = make()  # as another process would
    assert second.get(3).tobytes() == block(3)
    assert (first.fetched, second.fetched) == ([0, 1, 2, 3, 4], [])


def test_threads_that_ask_for_the_same_block_wait_for_one_fetch(make):
    source = make()
    source.pause_secs = 0.1
    found = []
    read = lambda: found.append(source.get(7).tobytes())
    threads = [threading.Thread(target=read) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, source.fetched) == ([block(7)] * 16, [7])


def test_an_error_is_raised_to_all_and_the_next_read_tries_again(make):
    cache = make().cache

    def fetch():
        time.sleep(0.05)
        raise DataError("no such block")

    found = []

    def read():
        try:
            cache.get("b", fetch, lambda data: True)
        except DataError as error:
            found.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["no such block"] * 4
    assert cache.get("b", lambda: b"x", lambda data: True).tobytes() == b"x"


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty", "folder"])
def test_a_damaged_block_on_disk_is_dropped_and_fetched_again(make, damage):
    source = make()
    source.get(1)
    [path] = source.cache.folder.glob("blocks/*")
    data = bytearray(block(1))
    data[500] ^= 1
    damaged = {"flip": data, "cut": data[:500], "longer": block(1) + b"x", "empty": b""}
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(damaged[damage])
    for _ in range(2):
        assert source.get(1).tobytes() == block(1)
    if damage != "folder":
        assert source.fetched == [1, 1]
        assert path.read_bytes() == block(1)


def test_the_disk_holds_the_blocks_read_latest_and_no_more_than_the_limit(make):
    source = make(max_blocks=10)
    for number in range(10):
        source.get(number)
        os.utime(source.cache.folder / f"blocks/b-{number}", (number + 1, number + 1))
    source.get(0)  # from disk: now the latest
    source.get(10)
    assert bytes_on_disk(source.cache) <= 10 * SIZE
    assert {"b-0", "b-9", "b-10"} <= files(source.cache)
    assert not {"b-1", "b-2"} & files(source.cache)


def test_the_limit_holds_with_many_threads(make):
    source = make(max_blocks=8)
    most = [0]

    def read(seed):
        rng = random.Random(seed)
        for _ in range(60):
            number = rng.randrange(40)
            assert source.get(number).tobytes() == block(number)
            most[0] = max(most[0], bytes_on_disk(source.cache))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 4 * SIZE < most[0] <= 8 * SIZE


def test_two_processes_share_blocks_and_the_limit(make, tmp_path):
    code = f"""
import random, sys
sys.path[:0] = {[str(pathlib.Path(__file__).parent)]!r}
import test_block_cache as here
from jaxinfra.data.block_cache import BlockCache
cache = BlockCache({str(tmp_path / "cache")!r}, 20_000, memory_bytes=0)
source, rng, most = here.Source(cache), random.Random(int(sys.argv[1])), 0
for _ in range(400):
    number = rng.randrange(30)
    assert source.get(number).tobytes() == here.block(number)
    most = max(most, here.bytes_on_disk(cache))
print(len(source.fetched), most)
"""
    run = [
        subprocess.Popen([sys.executable, "-c", code, seed], stdout=-1) for seed in "12"
    ]
    counts = [list(map(int, p.communicate(timeout=60)[0].split())) for p in run]
    assert all(most <= 20_000 for _, most in counts)
    assert all(fetched < 300 for fetched, _ in counts)  # alone: 400 reads, 30 blocks
    again = make(max_blocks=20)
    assert bytes_on_disk(again.cache) <= 20_000
    kept = sorted(files(again.cache))
    assert len(kept) >= 15
    for name in kept:
        assert again.get(int(name[2:])).tobytes() == block(int(name[2:]))
    assert again.fetched == []


def test_a_smaller_limit_and_what_a_dead_process_left_are_put_right_at_the_start(make):
    source = make(max_blocks=10)
    for number in range(10):
        source.get(number)
    (source.cache.folder / "blocks/b-77.tmp").write_bytes(b"x" * 5_000)
    (source.cache.folder / "total").write_text("no number")
    cache = make(max_blocks=5).cache
    assert bytes_on_disk(cache) <= 5 * SIZE
    assert "b-77.tmp" not in files(cache)
    assert int((cache.folder / "total").read_text()) == bytes_on_disk(cache)


def test_a_block_larger_than_the_limit_is_read_and_not_kept(make):
    source = make(max_blocks=0)
    assert source.get(1).tobytes() == block(1)
    assert files(source.cache) == set()


def test_a_full_disk_costs_the_cache_and_is_told_once(make, monkeypatch):
    said = []
    source = make(tell=said.append, memory_blocks=2)
    source.get(0)
    write = pathlib.Path.write_bytes

    def full(path, data):
        write(path, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    for number in range(6):
        assert source.get(number).tobytes() == block(number)
    [line] = said
    assert "cannot be written: No space left on device; going on without" in line
    assert files(source.cache) == {"b-0"}
    monkeypatch.undo()
    source.get(5), source.get(1), source.get(2), source.get(3)
    assert files(source.cache) == {"b-0", "b-1", "b-2", "b-3"}


def test_blocks_that_vanish_are_fetched_again(make):
    source = make(max_blocks=6)
    for number in range(20):
        source.get(number)
        for path in list(source.cache.folder.glob("blocks/*"))[::2]:
            path.unlink()
        assert source.get(number).tobytes() == block(number)


def test_memory_holds_the_latest_blocks_and_no_more(make):
    source = make(max_blocks=0, memory_blocks=3)
    for number in (0, 1, 2, 0, 3):
        source.get(number)
    assert source.fetched == [0, 1, 2, 3]
    source.get(0)
    assert source.fetched == [0, 1, 2, 3]
    source.get(1)  # went when 3 came
    assert source.fetched == [0, 1, 2, 3, 1]
    held = [name for name in map("b-{}".format, range(4)) if source.cache.holds(name)]
    assert held == ["b-0", "b-1", "b-3"]
    assert np.shares_memory(source.get(3), source.get(3))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"the cache folder .*file.* cannot be used: Not a"
    ):
        BlockCache(tmp_path / "file" / "cache", 10)
