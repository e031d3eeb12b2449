"""A key of an object store, or all keys below it, with the methods of a path.

Every call has a deadline for each try and one clock for all of them (`data.patience`);
errors are `FileNotFoundError`, `DataError` for what will not pass, and show nothing of
what a server said. A write is whole or not there, and durable when it returns.

Limits: a listing gives all keys below a folder at once.
"""

import functools
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import tensorstore

from jaxinfra import config
from jaxinfra.config import DataError
from jaxinfra.data import urls
from jaxinfra.data.patience import PATIENCE

TRY_SECS = 60.0  # of one request, and one more for each MiB that is known to go
SCHEMES = ("s3", "gs")
_ABSENT = b"\x02"  # TensorStore's generation of a key that is not there
_REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED")
_FINAL = ("NOT_FOUND", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION")
_SHORT = "OUT_OF_RANGE"
_CODE = re.compile(
    rf"\b({'|'.join((*_REFUSED, *_FINAL, _SHORT))})\b"
)  # of what will not pass

T = TypeVar("T")


class NoAnswer(ConnectionError):
    """Of the server, to one try; a later one may get one."""


class ServerFailed(ConnectionError):
    """To serve one try; a later one may fare better."""


class _TooShort(DataError):
    """A value ends before the bytes that were asked for."""


class ObjectPath:
    """`s3://bucket/key` or `gs://bucket/key`; as a folder, all keys below `key/`."""

    def __init__(self, url: str):
        scheme, _, rest = url.partition("://")
        self.bucket, _, key = rest.partition("/")
        self.scheme, self.key = scheme.lower(), "/".join(filter(None, key.split("/")))
        if self.scheme not in SCHEMES or not self.bucket or "@" in self.bucket:
            near = config.did_you_mean(scheme, SCHEMES)
            raise DataError(
                f"{urls.redacted(url)} must be s3://bucket/folder or gs://bucket/folder"
                f", without a user or a key in it{near}"
            )

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str | pathlib.PurePath) -> "ObjectPath":
        return ObjectPath(f"{self}/{name}")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.key).suffix

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(
            f"{self.scheme}://{self.bucket}/{self.key.rpartition('/')[0]}"
        )

    def with_name(self, name: str) -> "ObjectPath":
        return self.parent / name

    def is_file(self) -> bool:
        """Whether the key itself has a value."""
        return self._read(byte_range=slice(0, 0)) is not None

    def begins_with(self, text: bytes) -> bool:
        """Whether the key has a value that begins so; reads no more of it."""
        try:
            return self._read(byte_range=slice(0, len(text))) == text
        except _TooShort:
            return False

    def is_dir(self) -> bool:
        """Whether there are keys below it."""
        return bool(self.below())

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def below(self, begin: str = "") -> list[str]:
        """All keys below it that begin so, relative to it, sorted."""
        start = f"{self.key}/" if self.key else ""
        first = f"{start}{begin}"
        last = first[:-1] + chr(ord(first[-1]) + 1) if first else ""
        keys = tensorstore.KvStore.KeyRange(first, last)
        found = self._done(lambda kv: kv.list(keys, strip_prefix_length=len(start)))
        return sorted(key.decode() for key in found)

    def iterdir(self) -> Iterator["ObjectPath"]:
        """What stands directly below it, files and folders."""
        names = {key.partition("/")[0] for key in self.below()}
        return (self / name for name in sorted(names))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: a folder is there as soon as a key is."""

    def read_bytes(self, num_bytes: int = 0) -> bytes:
        """Raises FileNotFoundError where the key has no value.

        A value of about `num_bytes` is given the time for so many.
        """
        if (value := self._read(num_bytes=num_bytes)) is None:
            raise FileNotFoundError(2, "No such object", str(self))
        return value

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> BinaryIO:
        """The whole of it, in memory."""
        if mode != "rb":
            raise ValueError(f"open(mode={mode!r}): only 'rb'; write by write_bytes")
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, data: bytes) -> None:
        """Gives the key this value, whatever it had."""
        write = lambda kv: kv.write(self.key, data)
        self._done(write, what="written", num_bytes=len(data))

    def create(self, data: bytes) -> bool:
        """Gives the key this value if it has none; whether it now is ours.

        Of several that try one succeeds. The value must be like no other's: where a
        try's answer was lost, the value tells whose it is.
        """
        if (found := self._read()) is None:  # for servers that know no conditions
            write = lambda kv: kv.write(self.key, data, if_equal=_ABSENT)
            if self._done(write, what="written", num_bytes=len(data)).generation:
                return True
            found = self._read()
        return found == data

    def unlink(self, missing_ok: bool = True) -> None:
        """Removes the key's value, if it has one."""
        del missing_ok
        self._done(lambda kv: kv.write(self.key, None), what="deleted")

    def delete_below(self, folder: str = "") -> None:
        """Removes all keys below it, or below one of its folders."""
        start = str(self.key and f"{self.key}/") + (f"{folder}/" if folder else "")
        keys = tensorstore.KvStore.KeyRange(start, f"{start[:-1]}0")
        self._done(lambda kv: kv.delete_range(keys), what="deleted")

    def _read(self, num_bytes: int = 0, **options: Any) -> bytes | None:
        read = lambda kv: kv.read(self.key, **options)
        found = self._done(read, num_bytes=num_bytes)
        return None if found.state == "missing" else found.value

    def _done(
        self, request: Callable[[Any], Any], what: str = "read", num_bytes: int = 0
    ) -> Any:
        """The answer to a request, tried again while it may come."""
        try_secs = TRY_SECS + num_bytes / 2**20

        def attempt() -> Any:
            try:
                store = _store(self.scheme, self.bucket, os.getpid())
                return request(store).result(timeout=try_secs)
            except Exception as error:
                raise self._problem(error, what) from None

        return PATIENCE.until_done(str(self), attempt, what)

    def _problem(self, error: Exception, what: str) -> Exception:
        """Our own words for what went wrong: a server's may hold keys."""
        if isinstance(error, TimeoutError):
            return NoAnswer()
        if (found := _CODE.search(str(error))) is None:
            return ServerFailed()
        text = f"{self} cannot be {what}: {found[1]}"
        if found[1] in _REFUSED:
            source = urls.CREDENTIALS[self.scheme]
            return DataError(f"{text}: access is refused; check {source}")
        if found[1] == _SHORT:
            return _TooShort(text)
        return DataError(f"{text}: check the bucket and the endpoint")


@functools.cache  # one set of connections; a forked process has its own
def _store(scheme: str, bucket: str, process: int) -> Any:
    # A server that takes a connection and says nothing is one that does not answer.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "20")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    retries = {"max_retries": 2, "initial_delay": "100ms", "max_delay": "500ms"}
    if scheme == "gs":
        if host := os.environ.get("STORAGE_EMULATOR_HOST"):
            host = host if "://" in host else f"http://{host}"
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", host)
        spec = {"driver": "gcs", "bucket": bucket, "gcs_request_retries": retries}
        return tensorstore.KvStore.open(spec).result(timeout=TRY_SECS)
    spec = {"driver": "s3", "bucket": bucket, "s3_request_retries": retries}
    of = os.environ.get
    region = of("AWS_REGION") or of("AWS_DEFAULT_REGION")
    if endpoint := of("AWS_ENDPOINT_URL_S3") or of("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec |= {"aws_region": region}
    if of("AWS_ACCESS_KEY_ID"):
        spec |= {"aws_credentials": {"type": "environment"}}
    return tensorstore.KvStore.open(spec).result(timeout=TRY_SECS)
