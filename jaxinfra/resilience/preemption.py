"""What ends a run before its last step: a request to stop, or the loss of a peer.

A cluster sends SIGTERM some seconds before it kills, a user presses Ctrl-C. The loop
asks at every step, and all processes agree on the step to stop after
(`checkpoint.processes.make_ballot`); the handler itself does nothing but note the name.

Another process may be gone without a word. A dead peer's collectives raise here at
once, or hang: a device's thread may wait for another that has failed. So every process
also counts aloud in the job's key-value store and listens to the others, in a thread
that needs no device, and ends by exit code 14 instead of hanging.

Limits: a process that lives and does not get on is not noticed. The death of the first
process, which holds the store, may end the others through jax's own client (SIGABRT).
Imports no jax.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxinfra.resilience import exitcodes

PEER_LIMIT_SECS = 15.0  # a silence that a peer busy in one long C call does not reach
PEER_EVERY_SECS = 1.0
_TOPIC = "jaxinfra/alive/"
_LEFT = "left"


@dataclasses.dataclass
class StopRequest:
    """`requested` is the signal's name, None as long as nobody asked.

    `requested_secs` is the monotonic time of the first one, to tell a grace period.
    """

    requested: str | None = None
    requested_secs: float | None = None


def why_stop(request: StopRequest, *, since_secs: float, max_secs: float) -> str | None:
    """What asks this process to stop: a signal's name, or train.max_secs (0: no limit)
    counted from the monotonic time `since_secs`; None if nothing does."""
    if request.requested:
        return request.requested
    is_over = time.monotonic() - since_secs > max_secs > 0
    return "train.max_secs" if is_over else None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT into a `StopRequest` within the block.

    A second Ctrl-C kills at once. The handlers found are put back at the end.

    Raises:
      RuntimeError: outside the main thread, where Python takes no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "stop_requests() is called in a thread that is not the main one, and "
            "Python sets signal handlers there alone; enter it before starting threads"
        )
    request = StopRequest()

    def note(number: int, frame) -> None:
        del frame
        if request.requested is None:
            request.requested = signal.Signals(number).name
            request.requested_secs = time.monotonic()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    former = {
        number: signal.signal(number, note)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _exit(message: str) -> None:
    print(f"error: {message}; the same command goes on", file=sys.stderr, flush=True)
    os._exit(exitcodes.PEER_LOST)


@contextlib.contextmanager
def watched(
    store: Any,
    rank: int,
    *,
    lost: Callable[[str], None] = _exit,
    limit_secs: float = PEER_LIMIT_SECS,
    every_secs: float = PEER_EVERY_SECS,
) -> Iterator[None]:
    """Calls `lost` with the reason, from a thread, if a peer falls silent in the block.

    `store` is the coordination service's client. A process that leaves the block
    without an error takes leave; the others then expect nothing of it.
    """
    ended = threading.Event()
    key = f"{_TOPIC}{rank}"

    def watch() -> None:
        heard: dict[str, tuple[str, float]] = {}  # key -> its value, and since when
        turn = 0
        while not ended.wait(every_secs):
            turn += 1
            try:
                store.key_value_set(key, str(turn), allow_overwrite=True)
                said = store.key_value_dir_get(_TOPIC)
            except Exception as error:  # whatever it is, the job cannot be coordinated
                if not ended.is_set():
                    lost(f"the first process of the job does not answer: {error}")
                return
            now = time.monotonic()
            for name, value in said:
                if heard.get(name, ("", 0.0))[0] != value:
                    heard[name] = (value, now)
                value, since = heard[name]
                if value != _LEFT and now - since > limit_secs:
                    who = name.removeprefix(_TOPIC)
                    lost(f"process {who} is silent for {now - since:.0f} s")
                    return

    thread = threading.Thread(target=watch, name="peers", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        raise
    ended.set()
    thread.join(limit_secs)
    store.key_value_set(key, _LEFT, allow_overwrite=True)
