"""Files by URL on real servers of S3 and GCS: the same bytes, whatever happens."""

import itertools
import os
import random
import subprocess
import sys
import threading

import object_stores
import pytest

from jaxinfra.config import DataError
from jaxinfra.data import filesystems, prepare, storage
from jaxinfra.data.block_cache import BlockCache
from jaxinfra.data.patience import Patience
from jaxinfra.data.remote_file import RemoteFile, block_sums

pytestmark = pytest.mark.slow

BLOCK = 100_000
DATA = random.Random(0).randbytes(2_345_678)
FILES = {"a/x.bin": DATA, "a/y.txt": b"y", "a/b/z.txt": b"z", "a/odd +#.txt": b"odd"}


class Store:
    """A bucket with FILES on a server, and the environment that finds it."""

    def __init__(self, scheme, server, environment):
        self.server, self.environment = server, environment
        self.root = f"{scheme}://bucket"
        self.port = int(server.url.split(":")[2].split("/")[0])


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    s3fs = pytest.importorskip("s3fs", reason="needs the extra remote")
    with object_stores.s3_server(tmp_path_factory.mktemp("s3")) as server:
        environment = {
            "AWS_ACCESS_KEY_ID": object_stores.KEY,
            "AWS_SECRET_ACCESS_KEY": object_stores.SECRET,
            "AWS_ENDPOINT_URL": server.url,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        fs = s3fs.S3FileSystem(
            key=object_stores.KEY,
            secret=object_stores.SECRET,
            endpoint_url=server.url,
        )
        put(fs)
        yield Store("s3", server, environment)


@pytest.fixture(scope="module")
def gs(tmp_path_factory):
    core = pytest.importorskip("gcsfs.core", reason="needs the extra remote")
    with object_stores.gcs_server(tmp_path_factory.mktemp("gs")) as server:
        host = server.url.removesuffix("/storage/v1/b")
        put(core.GCSFileSystem(token="anon", project="test", endpoint_url=host))
        yield Store("gs", server, {"STORAGE_EMULATOR_HOST": host})


def put(fs):
    fs.mkdir("bucket")
    for path, data in FILES.items():
        fs.pipe_file(f"bucket/{path}", data)


@pytest.fixture(params=["s3", "gs"])
def store(request, monkeypatch):
    found = request.getfixturevalue(request.param)
    use(found, monkeypatch)
    yield found
    filesystems._made_filesystem.cache_clear()


def use(store, monkeypatch, **changes):
    for name, value in {**store.environment, **changes}.items():
        monkeypatch.setenv(name, value)
    filesystems._made_filesystem.cache_clear()


def remote_file(store, folder, **options):
    cache = BlockCache(folder, 10**8, memory_bytes=0)
    sums_K = block_sums(DATA, BLOCK)
    return RemoteFile(
        f"{store.root}/a/x.bin", len(DATA), sums_K, cache, BLOCK, **options
    )


def test_files_have_their_bytes_and_folders_their_files(store):
    for path, data in FILES.items():
        url = f"{store.root}/{path}"
        assert storage.size(url) == len(data)
        assert storage.read_bytes(url) == data
        assert storage.read_bytes(url, 0, 1) == data[:1]
        assert storage.list_files(url) == [url]
        with storage.open_stream(url) as stream:
            assert stream.read() == data
    url = f"{store.root}/a/x.bin"
    assert storage.read_bytes(url, 1_234_567, 2_345_678) == DATA[1_234_567:]
    names = [f"{store.root}/a/{name}" for name in ("odd +#.txt", "x.bin", "y.txt")]
    assert storage.list_files(f"{store.root}/a") == names
    assert storage.list_files(f"{store.root}/a/") == names
    assert storage.list_files(f"{store.root}/*/[xy]*") == names[1:]


def test_what_is_not_there_is_an_error_at_once(store):
    said = []
    patience = Patience(120, said.append)
    for url in (f"{store.root}/a/none", f"{store.root}-none/a"):
        for call in (storage.size, storage.read_bytes, storage.list_files):
            with pytest.raises(DataError, match=r"cannot be read: .*there is no such"):
                call(url, patience=patience)
    assert said == []


def test_two_processes_share_a_cold_cache(store, tmp_path):
    code = f"""
import sys; sys.path[:0] = {[p for p in sys.path if "tests" in p]!r}
import test_object_stores as here
file = here.remote_file(type("S", (), {{"root": {store.root!r}}}), {str(tmp_path)!r})
assert file.read(0, len(here.DATA)).tobytes() == here.DATA
"""
    run = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in run] == [0, 0]
    file = remote_file(store, tmp_path)
    file.url = "s3://no-bucket/none"  # all comes from the disk
    assert file.read(0, len(DATA)).tobytes() == DATA


def test_reads_go_on_when_the_server_was_killed_for_some_seconds(store, tmp_path):
    said = []
    file = remote_file(store, tmp_path, patience=Patience(120, said.append))
    assert file.read(0, 150_000).tobytes() == DATA[:150_000]
    store.server.kill()
    again = threading.Timer(3, store.server.start)
    again.start()
    file.read_ahead(range(5, 9))
    try:
        assert file.read(0, len(DATA)).tobytes() == DATA
    finally:
        again.join()
    assert "Connection refused; trying for up to 120 s" in said[0]
    assert "answers again" in said[-1]


def test_a_data_set_is_prepared_from_a_bucket_as_from_a_folder(store, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "y.txt").write_bytes(FILES["a/y.txt"])
    (folder / "odd +#.txt").write_bytes(FILES["a/odd +#.txt"])
    options = {"tokenizer": "byte", "split": "documents", "held_out": 0, "seed": 1}
    local = prepare.prepare([folder], tmp_path / "local", **options)
    for number, source in enumerate(["a", "a/", "a/*.txt"]):
        out = tmp_path / f"remote-{number}"
        remote = prepare.prepare([f"{store.root}/{source}"], out, **options)
        assert remote.digest == local.digest


def test_reads_go_on_through_connections_that_fail(s3, monkeypatch, tmp_path):
    faults = itertools.cycle(["503", "cut", "", "reset", "cut", "503"])
    proxy = object_stores.Proxy(s3.port, faults)
    use(s3, monkeypatch, AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}")
    file = remote_file(s3, tmp_path)
    assert file.read(0, len(DATA)).tobytes() == DATA
    proxy.listener.close()
    filesystems._made_filesystem.cache_clear()


@pytest.mark.parametrize(
    "wrong",
    [
        {"AWS_SECRET_ACCESS_KEY": "CANARYwrongCANARY"},
        {"AWS_ACCESS_KEY_ID": "CANARYnobody"},
    ],
    ids=["secret", "key"],
)
def test_wrong_credentials_are_an_error_at_once_that_does_not_show_them(s3, wrong):
    code = f"""
import logging
logging.basicConfig(level=logging.INFO)
from jaxinfra.data import storage
for call in (storage.size, storage.read_bytes, storage.open_stream, storage.list_files):
    try:
        call("{s3.root}/a/x.bin")
    except Exception as error:
        logging.exception("refused")
        print(type(error).__name__, error)
storage.list_files("{s3.root}/a/*")
"""
    environment = {**os.environ, **s3.environment, **wrong}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,  # a wait for something to pass would be of 4 x 120 s
        env=environment,
    )
    said = done.stdout + done.stderr
    assert "CANARY" not in said
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(
        line.startswith("DataError s3://bucket/a/x.bin cannot") for line in lines
    )
    assert said.count("access is refused; check AWS_ACCESS_KEY_ID") >= 5
    assert "trying for up to" not in said
