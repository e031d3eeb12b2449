"""Files by URL: the same bytes as on disk, through servers that fail and come back."""

import random
import socket
import subprocess
import sys
import threading
import time

import pytest
import servers

from jaxinfra.config import DataError
from jaxinfra.data import filesystems, storage, urls
from jaxinfra.data.patience import Patience

pytest.importorskip("aiohttp")
requests = pytest.importorskip("requests")

DATA = random.Random(0).randbytes(300_000)
FILES = {"a/x.txt": DATA, "a/y.txt": b"y", "a/b/z.txt": b"z", "empty.txt": b""}
SECRET = "CANARYcanary0123456789"


@pytest.fixture
def web():
    with servers.Server(files=dict(FILES)).running() as server:
        yield server


def places(server):
    """The same folder by every scheme that the server speaks."""
    return [server.url, f"webhdfs://127.0.0.1:{server.port}"]


def test_what_a_url_is():
    assert all(map(urls.is_url, ["s3://b/k", "gs://b", "http://h/", "hdfs://h/x"]))
    assert not any(map(urls.is_url, ["a/b", "/a", "c:\\x", "s3:/b", "a b://c", ""]))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:pass@host:80/a?sig=x#f", "http://host:80/a?..."),
        ("http://user@host/a", "http://host/a"),
        ("http://user:pa/ss@host/a", "http://...@host/a"),
        ("http://host:8080/a.txt", "http://host:8080/a.txt"),
        ("http://host:8080/a@2x.txt", "http://...@2x.txt"),  # a password may be so
        ("http://user:123/x@host/a", "http://...@host/a"),
        ("http://user:p@ss@host/a", "http://host/a"),
        ("http://user:p@ss/w@host/a", "http://...@host/a"),
        ("http://user:p?ss@host/a", "http://..."),
        ("http://user:p#ss@host/a", "http://..."),
        ("http://host/a#sig=x", "http://host/a#..."),
        ("http://host/a?mail=a@b", "http://host/a?..."),
        ("http:/user:pass@host/a", "http:/host/a"),  # as pathlib.Path writes it
        ("C:/a@b?c", "C:/a@b?c"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
    ],
)
def test_a_url_is_shown_without_what_is_secret(url, shown):
    assert urls.redacted(url) == shown
    assert str(storage.Url(url)) == shown
    assert url not in repr(storage.Url(url))


def test_bytes_sizes_and_streams_are_those_of_the_file(web):
    for root in places(web):
        url = f"{root}/a/x.txt"
        assert storage.size(url) == len(DATA)
        assert storage.read_bytes(url) == DATA
        for start, stop in [(0, 1), (7, 7), (12_345, 99_999), (299_999, 300_000)]:
            assert storage.read_bytes(url, start, stop) == DATA[start:stop]
        with storage.open_stream(url) as stream:
            assert stream.read(10) == DATA[:10]
            assert stream.seek(-5, 2) == len(DATA) - 5
            assert stream.read() == DATA[-5:]
            stream.seek(3)
            assert stream.read() == DATA[3:]
        with storage.open_stream(f"{root}/empty.txt") as stream:
            assert stream.read() == b""


def test_a_large_stream_is_read_in_few_requests(web, monkeypatch):
    monkeypatch.setattr(storage, "STREAM_BYTES", 100_000)
    with storage.open_stream(f"{web.url}/a/x.txt") as stream:
        web.requests.clear()
        assert stream.read() == DATA
    assert len(web.requests) == 3


@pytest.mark.parametrize("has_sizes", [True, False])
def test_a_server_without_ranges_is_streamed_and_not_read_in_parts(web, has_sizes):
    web.has_ranges, web.has_sizes = False, has_sizes
    url = f"{web.url}/a/x.txt"
    with storage.open_stream(url) as stream:
        stream.seek(-5, 2)
        assert stream.read() == DATA[-5:]
    with pytest.raises(DataError, match="gives no parts of a file"):
        storage.read_bytes(url, 5, 9)


def test_folders_and_globs_give_their_files_in_order(web):
    for root in places(web):
        x, y = f"{root}/a/x.txt", f"{root}/a/y.txt"
        assert storage.list_files(f"{root}/a/") == [x, y]
        assert storage.list_files(f"{root}/a/*.txt") == [x, y]
        assert storage.list_files(f"{root}/a/[y]*") == [y]
        assert storage.list_files(x) == [x]
        assert storage.list_files(f"{root}/a/*.csv") == []
    signed = f"{web.url}/a/x.txt?signature=a*b"
    assert storage.list_files(signed) == [signed]


def test_an_hdfs_url_is_of_webhdfs_on_its_own_port():
    assert filesystems.place_of("hdfs://h:9000/a").fs.url == "http://h:9870/webhdfs/v1"
    place = filesystems.place_of("webhdfs://h:14000/a/b")
    assert place.fs.url == "http://h:14000/webhdfs/v1"
    assert (place.path, place.prefix) == ("/a/b", "webhdfs://h:14000")


def flaky(probability, *faults):
    """A third of the requests fail, and no three in a row."""
    rng, lock, row = random.Random(0), threading.Lock(), [0]

    def fault(request):
        with lock:
            fails = rng.random() < probability and row[0] < 2
            row[0] = row[0] + 1 if fails else 0
            return rng.choice(faults) if fails else None

    return fault


def test_errors_that_pass_are_waited_for(web):
    web.fault = flaky(0.35, 500, 502, 503, 429, 408, "reset", "cut")
    for root in places(web):
        for start in range(0, 60_000, 3_000):
            found = storage.read_bytes(f"{root}/a/x.txt", start, start + 3_000)
            assert found == DATA[start : start + 3_000]


def test_a_server_that_is_away_is_waited_for_and_told_of_once(web):
    said = []
    patience = Patience(30, said.append)
    web = servers.Server(files=dict(FILES))
    with web.running():
        url = f"{web.url}/a/x.txt"
    found = []

    def read():
        found.append(storage.read_bytes(url, 10, 20, patience=patience))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)
    with web.running():
        for thread in threads:
            thread.join()
    assert found == [DATA[10:20]] * 4
    server = f"http://127.0.0.1:{web.port}"
    assert said[0] == f"{server}: Connection refused; trying for up to 30 s"
    assert said[1].startswith(f"{server}: answers again, after ")
    assert len(said) == 2


def test_patience_ends(web):
    web.fault = lambda request: 503
    with pytest.raises(DataError, match=r"x.txt cannot be read for \d s: HTTP 503"):
        storage.read_bytes(f"{web.url}/a/x.txt", patience=Patience(0.2))
    with socket.socket() as free:  # bound, and nobody listens
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for scheme in ("http", "webhdfs"):
            with pytest.raises(DataError, match=r"for \d s: Connection refused; check"):
                storage.size(f"{scheme}://127.0.0.1:{port}/a", patience=Patience(0.2))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "HTTP 401: access is refused; check "),
        (403, "HTTP 403: access is refused; check "),
        (404, "there is no such file, folder or bucket; check the URL"),
        (400, "HTTP 400: check the URL"),
    ],
)
def test_what_does_not_pass_is_an_error_after_one_request(web, status, message):
    web.fault = lambda request: status
    for root in places(web):
        web.requests.clear()
        with pytest.raises(DataError, match=f"/a/x.txt cannot be read: .*{message}"):
            storage.read_bytes(f"{root}/a/x.txt", 0, 9)
        assert len(web.requests) == 1


@pytest.fixture
def no_filesystems():
    """None is kept from before, and none for after."""
    filesystems._made_filesystem.cache_clear()
    yield
    filesystems._made_filesystem.cache_clear()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            401,
            "cannot be read: HTTP 401: access is refused; check GOOGLE_APPLICATION_C",
        ),
        (
            403,
            "cannot be read: HTTP 403: access is refused; check GOOGLE_APPLICATION_C",
        ),
        (404, "cannot be read: there is no such file, folder or bucket"),
        (503, r"cannot be read for \d s: HTTP 503; check the server"),
    ],
)
def test_answers_of_gcs_mean_the_same(
    web, no_filesystems, monkeypatch, capfd, status, message
):
    pytest.importorskip("gcsfs.core")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", web.url)
    web.fault = lambda request: status
    for call in (storage.size, storage.read_bytes, storage.list_files):
        with pytest.raises(DataError, match=f"gs://bucket/a {message}"):
            call("gs://bucket/a", patience=Patience(0.2))
    assert capfd.readouterr() == ("", "")


def test_credentials_of_gcs_that_cannot_be_read_are_an_error(
    no_filesystems, monkeypatch, tmp_path
):
    pytest.importorskip("gcsfs.core")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / SECRET))
    with pytest.raises(DataError, match="access is refused; check GOOGLE_APPL") as told:
        storage.size("gs://bucket/a")
    assert SECRET not in str(told.value)


def test_a_file_that_is_not_there_is_an_error(web):
    for root in places(web):
        for call in (storage.size, storage.read_bytes, storage.open_stream):
            with pytest.raises(DataError, match=r"none.txt cannot be read: .*no such"):
                call(f"{root}/none.txt")


def test_a_range_past_the_end_is_an_error(web):
    for root in places(web):
        with pytest.raises(DataError, match=r"gives 1 bytes, not 9, from byte 0 on"):
            storage.read_bytes(f"{root}/a/y.txt", 0, 9)


def test_an_unknown_scheme_is_an_error_with_a_hint():
    with pytest.raises(DataError, match=r"'htps'; known are s3.*did you mean https\?"):
        storage.read_bytes("htps://host/a")
    with pytest.raises(DataError, match="s3://bucket/a is written with a user"):
        storage.read_bytes(f"s3://key:{SECRET}@bucket/a")


@pytest.mark.parametrize("module", ["fsspec", "aiohttp", "requests"])
def test_a_missing_extra_is_named(module, monkeypatch):
    filesystems._made_filesystem.cache_clear()
    names = [n for n in sys.modules if n.split(".")[0] in (module, "fsspec")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    scheme = "webhdfs" if module == "requests" else "http"
    with pytest.raises(
        DataError, match=rf"{scheme}:// needs the extra remote: pip ins"
    ):
        storage.size(f"{scheme}://host/a")
    filesystems._made_filesystem.cache_clear()


def test_no_output_shows_a_password_or_a_signature(web):
    """In a process of its own, so that what libraries print counts too."""
    web.fault = lambda request: 403
    user = f"://user:{SECRET}@"
    secret = [f"{p.replace('://', user)}/a?sig={SECRET}" for p in places(web)]
    code = f"""
import logging
logging.basicConfig(level=logging.INFO)
from jaxinfra.data import storage
for url in {secret!r}:
    for call in (storage.size, storage.read_bytes, storage.list_files):
        try:
            call(url)
            print("done")
        except Exception as error:
            logging.exception("refused")
            print(repr(error))
storage.size({f"{web.url}/b?{SECRET}"!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert SECRET not in done.stdout + done.stderr
    assert done.stdout.count("403") >= 4
    sent = [h.get("Authorization", "") for h in web.headers]
    assert sum(h.startswith("Basic ") for h in sent) >= 4
