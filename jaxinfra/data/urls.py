"""URLs of files: the schemes that are known, and what of a URL may be shown."""

import re
from typing import Any

from jaxinfra.config import DataError
from jaxinfra.config import redacted as redacted  # what of a URL may be shown

# Where credentials come from, by scheme; shown where they are refused.
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "http": "user:password@ or the signature in the URL",
    "https": "user:password@ or the signature in the URL",
    "webhdfs": "HADOOP_USER_NAME, or user:password@ in the URL",
    "hdfs": "HADOOP_USER_NAME, or user:password@ in the URL",
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def is_url(path: Any) -> bool:
    """Whether it is a text that begins with scheme://."""
    return isinstance(path, str) and _URL.match(path) is not None


def check_local(path: Any, *, key: str, fix: str) -> None:
    """Raises DataError for a URL where only a path of this machine will do."""
    if is_url(path):
        raise DataError(
            f"{key}={redacted(path)!r} is a URL, and must be a path on this machine; "
            f"{fix}"
        )


def scheme_of(url: str) -> str:
    """What stands before ://, in lower case; empty where nothing does."""
    found = _URL.match(url)
    return found.group(1).lower() if found else ""


def server_of(url: str) -> str:
    """Scheme and host or bucket, to be shown."""
    scheme, _, rest = redacted(url).partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def is_glob(url: str) -> bool:
    """Whether it names files by a pattern; on the web, a ? begins the query."""
    signs = "*[" if scheme_of(url).startswith("http") else "*?["
    return any(sign in path_of(url) for sign in signs)


def path_of(url: str) -> str:
    """The URL without the query and fragment that it has on the web."""
    return re.split("[?#]", url)[0] if scheme_of(url).startswith("http") else url
