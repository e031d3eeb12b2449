"""Work that is wanted soon, by a few threads: bounded, forgettable, never awaited."""

import collections
import contextlib
import threading
from collections.abc import Callable, Hashable
from typing import Any

THREADS, MAX_WAITING = 16, 256


class ReadAhead:
    """Calls functions in other threads; what goes wrong there is not told.

    At most `threads` at once and `max_waiting` to come, more are left out. The threads
    are daemons, so that a process may end while they wait for a server.
    """

    def __init__(self, threads: int = THREADS, max_waiting: int = MAX_WAITING):
        self._max_threads, self._max_waiting = threads, max_waiting
        self._lock = threading.Lock()  # of what follows
        self._waiting: collections.OrderedDict[Hashable, Callable[[], Any]] = (
            collections.OrderedDict()
        )
        self._num_threads = 0

    def begin(self, key: Hashable, call: Callable[[], Any]) -> bool:
        """Calls `call` soon, once for all who ask by `key` until then; false where
        there is no room."""
        with self._lock:
            if key in self._waiting:
                return True
            if len(self._waiting) >= self._max_waiting:
                return False
            self._waiting[key] = call
            if self._num_threads == self._max_threads:
                return True
            self._num_threads += 1
        try:
            threading.Thread(target=self._work, name="ahead", daemon=True).start()
        except RuntimeError:  # the system has no more threads
            with self._lock:
                self._num_threads -= 1
        return True

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._num_threads -= 1
                    return
                _, call = self._waiting.popitem(last=False)
            with contextlib.suppress(Exception):  # who needs the result meets it again
                call()
