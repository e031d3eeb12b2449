"""Calls to servers, tried again while they may go well: one clock for all of storage.

What may pass (no connection, a timeout, 5xx, throttling) is waited for; what does not
(wrong credentials, nothing there) is a `DataError` at once. No message repeats what a
library or a server says in its own words, which may hold headers and keys: it is made
of a redacted URL, a number, and names of errors.
"""

import errno
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from jaxinfra.config import DataError
from jaxinfra.data import urls

PATIENCE_SECS = 120.0
_SHORTEST_PAUSE_SECS, _LONGEST_PAUSE_SECS = 0.1, 5.0
_TELL_AFTER_SECS = 1.0  # a shorter outage is no news
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
}
_PASSING = {  # by name: of libraries that may not be there; others are OSErrors
    "ConnectionError",  # of botocore, no OSError
    "HTTPClientError",
    "ResponseParserError",
    "CredentialRetrievalError",
    "ClientError",
    "ChecksumError",
    "HTTPException",
    "IncompleteRead",
}
_STATUSES_THAT_PASS = {408, 425, 429, *range(500, 600)} - {501}
_CODE = re.compile(r"[A-Za-z]{1,40}")  # of S3: a name, nothing else

T = TypeVar("T")


class Patience:
    """How long is waited for what may pass, and who is told of it.

    secs: of one call in all, the last try aside. tell: gets a line when a server has
    not answered for a second, and one when it does again, however many threads wait.
    """

    def __init__(
        self,
        secs: float = PATIENCE_SECS,
        tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ):
        self.secs = secs
        self._tell = tell
        self._lock = threading.Lock()
        self._waited_since: dict[str, float] = {}  # by server, once told

    def until_done(self, url: str, call: Callable[[], T], what: str = "read") -> T:
        """What `call` returns in the end; DataError, naming `url`, if it cannot."""
        start_secs, server = time.monotonic(), urls.server_of(url)
        pause_secs = _SHORTEST_PAUSE_SECS
        while True:
            try:
                result = call()
                self._tell_of_end(server)
                return result
            except DataError:
                raise
            except Exception as error:
                problem = _problem(url, error)
            waited_secs = time.monotonic() - start_secs
            if not problem.may_pass:
                raise DataError(
                    f"{urls.redacted(url)} cannot be {what}: {problem.text}"
                )
            if waited_secs >= self.secs:
                with self._lock:
                    self._waited_since.pop(server, None)
                raise DataError(
                    f"{urls.redacted(url)} cannot be {what} for {waited_secs:.0f} s: "
                    f"{problem.text}; check the server and the network, and start again"
                )
            if waited_secs >= _TELL_AFTER_SECS:
                self._tell_of_start(server, start_secs, problem.text)
            # Not all threads and hosts at once.
            time.sleep(
                min(pause_secs, self.secs - waited_secs) * random.uniform(0.5, 1)
            )
            pause_secs = min(2 * pause_secs, _LONGEST_PAUSE_SECS)

    def _tell_of_start(self, server: str, start_secs: float, text: str) -> None:
        with self._lock:
            if server in self._waited_since:
                return
            self._waited_since[server] = start_secs
        self._tell(f"{server}: {text}; trying for up to {self.secs:.0f} s")

    def _tell_of_end(self, server: str) -> None:
        with self._lock:
            start_secs = self._waited_since.pop(server, None)
        if start_secs is not None:
            waited_secs = time.monotonic() - start_secs
            self._tell(f"{server}: answers again, after {waited_secs:.0f} s")


PATIENCE = Patience()  # of all calls that are given no other


class _Problem(NamedTuple):
    text: str  # without a word of the library's or the server's
    may_pass: bool


def _problem(url: str, error: Exception) -> _Problem:
    """What went wrong, and whether it may go well a second later."""
    scheme = urls.scheme_of(url)
    refused = f"access is refused; check {urls.CREDENTIALS[scheme]}"
    nothing = "there is no such file, folder or bucket; check the URL"
    chain: list[BaseException] = [error]
    while chain[-1].__cause__:
        chain.append(chain[-1].__cause__)
    # Of google.auth, while it renews credentials; gcsfs makes it a 401.
    is_renewing = any(type(e).__name__ == "TransportError" for e in chain)
    if is_renewing or any(getattr(e, "retryable", False) is True for e in chain):
        return _Problem("credentials could not be renewed", may_pass=True)
    for status, code in filter(None, map(_answer, chain)):
        text = f"HTTP {status} {code}".rstrip()
        if status in _STATUSES_THAT_PASS or code == "RequestTimeout":
            return _Problem(text, may_pass=True)
        cut = "it ends before these bytes; upload it again"
        rules = {401: refused, 403: refused, 404: nothing, 407: refused, 416: cut}
        return _Problem(f"{text}: {rules.get(status, 'check the URL')}", may_pass=False)
    if getattr(error, "errno", None) == errno.ENOSPC:  # here, for a temporary file
        return _Problem(f"{os.strerror(errno.ENOSPC)} here; free some", may_pass=False)
    names = {kind.__name__ for e in chain for kind in type(e).__mro__}
    kinds = tuple(type(e) for e in chain)
    if names & _NO_CREDENTIALS:
        return _Problem(refused, may_pass=False)
    text = _said_by_system(error) or type(error).__name__
    if any(issubclass(kind, ValueError | TypeError) for kind in kinds):
        return _Problem(f"{text}; check the URL and the settings", may_pass=False)
    ends = (FileNotFoundError, PermissionError)
    if names & _PASSING or any(
        issubclass(kind, OSError) and not issubclass(kind, ends) for kind in kinds
    ):
        return _Problem(text, may_pass=True)
    if "FileNotFoundError" in names:
        return _Problem(nothing, may_pass=False)
    if "PermissionError" in names or "RefreshError" in names:
        return _Problem(refused, may_pass=False)
    # A name node that starts or stands by says so by a RuntimeError of fsspec's.
    is_passing = scheme in ("webhdfs", "hdfs") and "RuntimeError" in names
    return _Problem(text, may_pass=is_passing)


def _answer(error: Any) -> tuple[int, str] | None:
    """(HTTP status, S3's name of the error) of an exception that has one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(response.get("Error", {}).get("Code", ""))
        return (status, code if _CODE.fullmatch(code) else "") if status else None
    if response is not None and isinstance(error, OSError):  # of requests
        return response.status_code, ""
    if type(error) is OSError and str(error).startswith("Forbidden: "):  # of gcsfs
        return 403, ""
    match type(error).__name__:
        case "ClientResponseError" if not error.__cause__:  # of aiohttp; else cut off
            return error.status, ""
        case "HttpError" if error.code:  # of gcsfs
            return int(error.code), ""
    return None


def _said_by_system(error: BaseException | None) -> str:
    """The operating system's words for the first error that it had."""
    text = ""
    while error is not None:
        number = getattr(error, "errno", None)
        if isinstance(number, int):
            text = os.strerror(number) if number > 0 else "no address for the host"
        error = error.__cause__ or error.__context__
    return text
