"""The file systems of fsspec behind URLs: how each is made, and how ranges are read.

    s3://bucket/key            botocore's settings: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL
    gs://bucket/key            GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST
    http://, https://          user:password@, and signatures in the query
    webhdfs://host:port/path   HADOOP_USER_NAME, or user:password@
    hdfs://host/path           WebHDFS too, at port 9870 of the host: a port in the URL
                               would be of Hadoop's own protocol, which is not spoken

Needs the extra `remote`. The libraries' own retries are off: `patience` has the one
clock. Limits: no Kerberos, no zonal buckets of GCS.
"""

import functools
import logging
import os
import sys
import threading
import urllib.parse
from typing import Any, NamedTuple

from jaxinfra import config
from jaxinfra.config import DataError
from jaxinfra.data import urls

_WEBHDFS_PORT = 9870
_CONNECT_SECS, _READ_SECS = 5.0, 20.0  # of one try, until nothing has come for as long
_making = threading.Lock()


class Place(NamedTuple):
    """A URL as its file system of fsspec knows it."""

    fs: Any
    path: str
    prefix: str  # of the names that the file system gives, to URLs

    @property
    def is_web(self) -> bool:
        return "http" in self.fs.protocol

    @property
    def is_webhdfs(self) -> bool:
        return "webhdfs" in self.fs.protocol

    def is_file(self) -> bool:
        if self.is_web:
            return not urls.path_of(self.path).endswith("/")
        return self.info()["type"] == "file"

    def info(self) -> dict[str, Any]:
        return self.fs.info(self.path)

    def read(self) -> bytes:
        if self.is_webhdfs:  # its own `cat_file` takes a page of an error for bytes
            return self.fs._call("OPEN", path=self.path).content
        return self.fs.cat_file(self.path)

    def read_range(self, start: int, stop: int) -> bytes:
        """May be short, at the end of the file or where a connection was cut."""
        if self.is_webhdfs:
            part = {"offset": start, "length": stop - start}
            return self.fs._call("OPEN", path=self.path, **part).content
        if self.is_web:
            sync = sys.modules["fsspec.asyn"].sync
            return sync(self.fs.loop, _web_range, self.fs, self.path, start, stop)
        return self.fs.cat_file(self.path, start=start, end=stop)


def place_of(url: str) -> Place:
    """Raises DataError for a scheme that is not known, or without the extra."""
    scheme = urls.scheme_of(url)
    if scheme not in urls.CREDENTIALS:
        near = config.did_you_mean(scheme, urls.CREDENTIALS)
        raise DataError(
            f"{urls.redacted(url)} has the scheme {scheme!r}; known are "
            f"{', '.join(urls.CREDENTIALS)}{near}"
        )
    parts = urllib.parse.urlsplit(url)
    if scheme in ("s3", "gs"):
        if "@" in parts.netloc:
            raise DataError(
                f"{urls.redacted(url)} is written with a user or a key; leave it out: "
                f"credentials come from {urls.CREDENTIALS[scheme]}"
            )
        fs = _filesystem(scheme, "", os.getpid())
        return Place(fs, url[len(scheme) + 3 :], f"{scheme}://")
    fs = _filesystem(scheme, parts.netloc, os.getpid())
    if scheme in ("http", "https"):
        return Place(fs, url, "")
    prefix = f"{scheme}://{parts.netloc}"
    return Place(fs, url[len(prefix) :] or "/", prefix)


async def _web_range(fs: Any, url: str, start: int, stop: int) -> bytes:
    session = await fs.set_session()
    headers = {"Range": f"bytes={start}-{stop - 1}"}
    async with session.get(fs.encode_url(url), headers=headers) as response:
        response.raise_for_status()
        if response.status != 206:  # the whole file comes, of whatever size
            raise DataError(
                f"{urls.redacted(url)} is on a server that gives no parts of a file; "
                "serve it from one that knows ranges of bytes"
            )
        return await response.read()


def _filesystem(scheme: str, server: str, process: int) -> Any:
    with _making:
        return _made_filesystem(scheme, server, process)


@functools.cache  # one set of connections for all threads; a forked process has its own
def _made_filesystem(scheme: str, server: str, process: int) -> Any:
    """The file system of fsspec for a scheme and, but for s3 and gs, a server."""
    own: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        import fsspec.asyn

        if scheme in ("webhdfs", "hdfs"):
            return _webhdfs(fsspec.filesystem, scheme, server, own)
        if scheme == "s3":
            settings = {
                "retries": {"max_attempts": 0},
                "connect_timeout": _CONNECT_SECS,
                "read_timeout": _READ_SECS,
                "max_pool_connections": 32,
            }
            fs = fsspec.filesystem("s3", config_kwargs=settings, **own)
            fs.retries = 1
            return fs
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_SECS, sock_read=_READ_SECS
        )
        if scheme == "gs":
            return _gcs(timeout, own)
        client = {
            "timeout": timeout,
            "trust_env": True,
            "headers": {"Accept-Encoding": "identity"},  # sizes and ranges of the file
        }
        return fsspec.filesystem(scheme, client_kwargs=client, **own)
    except ImportError as error:
        raise DataError(
            f"{scheme}:// needs the extra remote: pip install 'jaxinfra[remote]'"
        ) from error


def _gcs(timeout: Any, own: dict[str, Any]) -> Any:
    # Else it loads gRPC and asks for each bucket's kind, which emulators do not know.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs.core
    import google.auth.exceptions

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints what it raises
    make = functools.partial(gcsfs.core.GCSFileSystem, requests_timeout=timeout, **own)
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        fs = make(token="anon")
    else:
        try:
            fs = make(token="google_default")
        except google.auth.exceptions.DefaultCredentialsError:
            if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                raise
            fs = make(token="anon")  # as far as buckets are public
    once = gcsfs.core.GCSFileSystem._request.__wrapped__
    fs._request = functools.partial(once, fs)
    return fs


def _webhdfs(filesystem: Any, scheme: str, server: str, own: dict[str, Any]) -> Any:
    parts = urllib.parse.urlsplit(f"//{server}")
    port = parts.port if scheme == "webhdfs" else None
    user = parts.username or os.environ.get("HADOOP_USER_NAME")
    fs = filesystem(
        "webhdfs",
        host=parts.hostname,
        port=port or _WEBHDFS_PORT,
        user=user and urllib.parse.unquote(user),
        password=parts.password and urllib.parse.unquote(parts.password),
        **own,
    )
    limits = (_CONNECT_SECS, _READ_SECS)
    fs.session.request = functools.partial(fs.session.request, timeout=limits)
    return fs
