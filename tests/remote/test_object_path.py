"""Keys as paths: what is there, who created it, and errors without a server's words."""

import concurrent.futures

import pytest

from jaxinfra.config import DataError
from jaxinfra.data.patience import Patience
from jaxinfra.remote import object_path
from jaxinfra.remote.object_path import ObjectPath


def test_a_key_acts_as_a_path(bucket):
    path = bucket / "a" / "b.json"
    assert str(path) == "s3://bucket/run/a/b.json"
    assert (path.name, path.parent) == ("b.json", bucket / "a")
    assert path.with_name("c") == bucket / "a/c"
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    path.write_bytes(b"12")
    assert path.read_text() == "12"
    assert path.open().read(1) == b"1"
    assert path.begins_with(b"1")
    assert not any(map(path.begins_with, (b"2", b"123")))
    assert not (bucket / "a/c").begins_with(b"1")
    assert path.is_file()
    assert not path.is_dir()
    assert (bucket / "a").is_dir()
    assert not (bucket / "a").is_file()


def test_a_folder_lists_and_deletes_its_own_keys_alone(bucket):
    for name in ("a/x", "a/y/z", "ab", "a0", "b/x"):
        (bucket / name).write_bytes(b"")
    assert (bucket / "a").below() == ["x", "y/z"]
    assert bucket.below("a") == ["a/x", "a/y/z", "a0", "ab"]
    assert [path.name for path in bucket.iterdir()] == ["a", "a0", "ab", "b"]
    (bucket / "a").delete_below("y")
    assert (bucket / "a").below() == ["x"]
    (bucket / "a").delete_below()
    assert bucket.below() == ["a0", "ab", "b/x"]
    (bucket / "ab").unlink()
    (bucket / "ab").unlink()
    assert bucket.below() == ["a0", "b/x"]


def test_of_many_that_create_a_key_one_succeeds(bucket):
    path = bucket / "commit"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: path.create(b"%d" % n), range(32)))
    assert sum(won) == 1
    assert path.read_bytes() == b"%d" % won.index(True)


def test_who_created_a_key_and_lost_the_answer_is_told_so(bucket):
    assert (bucket / "x").create(b"mine")
    assert (bucket / "x").create(b"mine")
    assert not (bucket / "x").create(b"another's")


class _Failing:
    """A store whose first answers are these errors."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def read(self, key):
        future = concurrent.futures.Future()
        if self.errors:
            future.set_exception(self.errors.pop(0))
        else:
            kind = type("Read", (), {"state": "value", "value": b"good"})
            future.set_result(kind())
        return future


@pytest.fixture
def quick(monkeypatch):
    said = []
    monkeypatch.setattr(object_path, "PATIENCE", Patience(0.5, said.append))
    return said


def use(monkeypatch, store):
    monkeypatch.setattr(object_path, "_store", lambda *unused: store)
    return ObjectPath("gs://bucket/x")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("UNAVAILABLE: Connection refused [key=CANARY]"),
        ValueError("Error writing: ABORTED: HTTP response code: 503"),
        ValueError("INTERNAL: 500"),
        TimeoutError(),
    ],
)
def test_what_may_pass_is_tried_again(error, quick, monkeypatch):
    path = use(monkeypatch, _Failing(error, error))
    assert path.read_bytes() == b"good"


def test_a_request_of_many_bytes_is_given_the_time_for_them(quick, monkeypatch):
    class Timed:
        def read(self, key):
            return self

        def write(self, key, data):
            return self

        def result(self, timeout):
            given.append(timeout)
            return type("Answer", (), {"state": "value", "value": b""})

    given = []
    path = use(monkeypatch, Timed())
    path.read_bytes()
    path.read_bytes(100 << 20)
    path.write_bytes(bytes(3 << 20))
    assert given == [60, 160, 63]


def test_an_outage_that_does_not_end_is_an_error_in_time_and_in_our_words(
    quick, monkeypatch
):
    error = ValueError("UNAVAILABLE: <Secret>CANARY</Secret>")
    path = use(monkeypatch, _Failing(*[error] * 1000))
    with pytest.raises(DataError, match=r"gs://bucket/x cannot be read for .* s: Serv"):
        path.read_bytes()
    assert "CANARY" not in "".join(quick)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("PERMISSION_DENIED: CANARY", "access is refused; check GOOGLE_APPLICATION"),
        ("NOT_FOUND: no bucket CANARY", "check the bucket and the endpoint"),
    ],
)
def test_what_will_not_pass_is_an_error_at_once(text, says, quick, monkeypatch):
    failing = _Failing(*[ValueError(text)] * 2)
    with pytest.raises(DataError, match=says) as error:
        use(monkeypatch, failing).read_bytes()
    assert len(failing.errors) == 1
    assert "CANARY" not in str(error.value)


@pytest.mark.parametrize("url", ["s4://b/x", "s3://", "s3://key:CANARY@bucket/x"])
def test_a_url_that_names_no_bucket_is_refused_without_its_secrets(url):
    with pytest.raises(DataError, match="s3://bucket/folder") as error:
        ObjectPath(url)
    assert "CANARY" not in str(error.value)
