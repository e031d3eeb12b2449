"""What ends a run before its last step: a request to stop. `peers`: one that is lost.

A cluster sends SIGTERM some seconds before it kills, a user presses Ctrl-C. The loop
asks at every step, and all processes agree on the step to stop after
(`checkpoint.processes.make_ballot`); the handler itself does nothing but note the name.

Imports no jax.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator


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
