"""A file by URL, in blocks: the bytes of the file, whatever server and disk do."""

import random
import threading
import time

import numpy as np
import pytest
import servers
import xxhash

from jaxinfra.config import DataError
from jaxinfra.data.block_cache import BlockCache
from jaxinfra.data.patience import Patience
from jaxinfra.data.read_ahead import ReadAhead
from jaxinfra.data.remote_file import RemoteFile, block_sums, cached_file

pytest.importorskip("aiohttp")

BLOCK = 1_000
DATA = random.Random(0).randbytes(25_300)
NUM_BLOCKS = 26


@pytest.fixture
def web():
    with servers.Server(files={"tokens": DATA}).running() as server:
        yield server


@pytest.fixture
def make(tmp_path, web):
    def make(*, memory_bytes=0, max_bytes=10**6, patience=None, ahead=None):
        cache = BlockCache(tmp_path / "cache", max_bytes, memory_bytes=memory_bytes)
        patience = patience or Patience(30, lambda line: None)
        url = f"{web.url}/tokens"
        sums_K = block_sums(DATA, BLOCK)
        return RemoteFile(
            url, len(DATA), sums_K, cache, BLOCK, patience=patience, ahead=ahead
        )

    return make


def until(is_done):
    deadline = time.monotonic() + 20
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sums_are_of_consecutive_blocks():
    sums_K = block_sums(DATA, BLOCK)
    assert (sums_K.shape, sums_K.dtype) == ((NUM_BLOCKS,), np.uint64)
    assert int(sums_K[0]) == xxhash.xxh3_64_intdigest(DATA[:1_000])
    assert int(sums_K[25]) == xxhash.xxh3_64_intdigest(DATA[25_000:])
    assert block_sums(b"", BLOCK).shape == (0,)


def test_every_range_has_the_bytes_of_the_file(make, web):
    file = make()
    rng = random.Random(1)
    places = [sorted(rng.choices(range(len(DATA) + 1), k=2)) for _ in range(200)]
    for start, stop in [(0, len(DATA)), (999, 1_001), (5, 5), *places]:
        found = file.read(start, stop)
        assert (found.dtype, found.tobytes()) == (np.uint8, DATA[start:stop])
    assert len(web.requests) == len(set(web.requests)) == NUM_BLOCKS
    for start, stop in [(-1, 3), (3, 2), (0, len(DATA) + 1)]:
        with pytest.raises(IndexError):
            file.read(start, stop)


def test_a_range_of_one_block_is_a_view_of_it(make):
    file = make(memory_bytes=10**6)
    assert np.shares_memory(file.read(10, 500), file.read(0, 999))
    assert not file.read(10, 500).flags.writeable


def test_another_url_of_the_same_bytes_finds_the_cache(make, web):
    make().read(0, len(DATA))
    web.requests.clear()
    file = make()
    file.url = f"{web.url}/tokens?signature=anew"
    assert file.read(0, len(DATA)).tobytes() == DATA
    assert web.requests == []


def test_other_bytes_at_the_same_url_are_not_taken_from_the_cache(make, web, tmp_path):
    make().read(0, len(DATA))
    web.files["tokens"] = other = DATA[::-1]
    cache = BlockCache(tmp_path / "cache", 10**6)
    sums_K = block_sums(other, BLOCK)
    file = RemoteFile(f"{web.url}/tokens", len(other), sums_K, cache, BLOCK)
    assert file.read(0, len(other)).tobytes() == other


def test_bytes_that_came_wrong_once_are_fetched_again(make, web):
    bad = bytearray(DATA)
    bad[1_500] ^= 1
    web.files["tokens"] = bytes(bad)

    def fault(request):
        if len(web.requests) == 3:
            web.files["tokens"] = DATA

    web.fault = fault
    assert make().read(1_400, 1_600).tobytes() == DATA[1_400:1_600]
    assert len(web.requests) == 3


def test_bytes_that_stay_wrong_are_an_error_that_names_url_and_block(make, web):
    bad = bytearray(DATA)
    bad[1_500] ^= 1
    web.files["tokens"] = bytes(bad)
    file = make()
    with pytest.raises(
        DataError, match=r"/tokens: block 1 \(bytes 1000 to 2000\) came"
    ):
        file.read(1_400, 1_600)
    assert len(web.requests) == 3
    assert file.read(0, 1_000).tobytes() == DATA[:1_000]


def test_sums_of_another_number_are_an_error(make, tmp_path):
    cache = BlockCache(tmp_path / "other", 10**6)
    for sums_K in (np.zeros(25, np.uint64), np.zeros(26, np.int64)):
        with pytest.raises(
            DataError, match="has 26 blocks of 1000 bytes, and its sums"
        ):
            RemoteFile("http://h/a", len(DATA), sums_K, cache, BLOCK)


def test_blocks_are_read_ahead_in_the_background(make, web):
    file = make(memory_bytes=10**6)
    file.read_ahead([3, 4, 5, 3, 4])
    until(lambda: len(web.requests) >= 3 and file._ahead._num_threads == 0)
    assert file.read(3_000, 6_000).tobytes() == DATA[3_000:6_000]
    file.read_ahead([3, 4, 5])
    assert len(web.requests) == 3


def test_reading_ahead_is_bounded_and_what_is_too_much_is_left_out(make, web):
    def slow(request):
        time.sleep(0.05)

    web.fault = slow
    ahead = ReadAhead(threads=2, max_waiting=4)
    files = [make(ahead=ahead), make(ahead=ahead)]
    for file in files:
        file.read_ahead(range(NUM_BLOCKS))
    assert ahead._num_threads == 2  # of all files together
    until(lambda: ahead._num_threads == 0)
    assert 4 <= len(web.requests) <= 8


def test_an_error_of_reading_ahead_shows_when_the_block_is_read(make, web):
    web.fault = lambda request: 403
    file = make()
    file.read_ahead([1, 2, 999])
    until(lambda: len(web.requests) >= 2 and file._ahead._num_threads == 0)
    with pytest.raises(DataError, match="tokens cannot be read: HTTP 403"):
        file.read(1_000, 1_001)
    web.fault = lambda request: None
    assert file.read(1_000, 1_001).tobytes() == DATA[1_000:1_001]


def test_reads_go_on_after_an_outage(make):
    """The server is killed while blocks are read, and started again."""
    said = []
    server = servers.Server(files={"tokens": DATA})
    with server.running():
        file = make(patience=Patience(30, said.append))
        file.url = f"{server.url}/tokens"
        assert file.read(0, 3_000).tobytes() == DATA[:3_000]
    found = []
    reader = threading.Thread(target=lambda: found.append(file.read(0, len(DATA))))
    reader.start()
    file.read_ahead(range(3, 9))
    until(lambda: said)
    with server.running():
        reader.join()
    assert found[0].tobytes() == DATA
    assert [line.split(": ")[1].split(",")[0] for line in said] == [
        "Connection refused; trying for up to 30 s",
        "answers again",
    ]


def test_a_whole_file_is_cached_by_its_checksum(web, tmp_path):
    cache = BlockCache(tmp_path / "cache", 10**6, memory_bytes=0)
    web.files["lengths"] = DATA
    checksum = xxhash.xxh3_128_hexdigest(DATA)
    for _ in range(2):
        assert cached_file(f"{web.url}/lengths", checksum, cache) == DATA
    assert len(web.requests) == 1
    with pytest.raises(DataError, match="lengths came 3 times with another checksum"):
        cached_file(f"{web.url}/lengths", "0" * 32, cache)
    with pytest.raises(DataError, match=r"the checksum '\.\./x', not 32 digits"):
        cached_file(f"{web.url}/lengths", "../x", cache)
