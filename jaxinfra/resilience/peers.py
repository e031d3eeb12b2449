"""The other processes of the job: one that is lost, and those that compile for longer.

A peer may be gone without a word. A dead peer's collectives raise here at once, or
hang: a device's thread may wait for another that has failed. So every process also
counts aloud in the job's key-value store and listens to the others, in a thread that
needs no device, and ends by exit code 14 instead of hanging.

A collective waits for its processes, but gloo's first one for 30 s alone. Processes do
not compile alike: the first one reads programs that it has kept, where others make
theirs, for minutes on a busy machine. `compiled_by_all` lets none run before all can.

Limits: a process that lives and does not get on is not noticed. What is compiled after
training, to sample, is not waited for. The death of the first
process, which holds the store, may end the others through jax's own client (SIGABRT).
Loaded where there are several processes.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxinfra.resilience import exitcodes

PEER_LIMIT_SECS = 15.0  # a silence that a peer busy in one long C call does not reach
PEER_EVERY_SECS = 1.0
COMPILE_LIMIT_SECS = 3600.0  # who is lost meanwhile is noticed by `watched`
_TOPIC = "jaxinfra/alive/"
_LEFT = "left"


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


def compiled_by_all(experiment: Any, store: Any) -> Any:
    """`experiment`, whose steps first run when every process of the job has compiled
    them; again where a batch (the last argument) comes in new shapes, as on a ramp."""
    steps = {
        name: _met(getattr(experiment, name), store, f"jaxinfra/compiled/{name}")
        for name in ("train_step", "eval_step")
    }
    return experiment._replace(**steps)


def _met(function: Any, store: Any, topic: str) -> Callable[..., Any]:
    import jax

    compiled = set()

    def call(*args: Any) -> Any:
        shapes = tuple(np.shape(x) for x in jax.tree.leaves(args[-1]))
        if shapes not in compiled:
            function.lower(*args).compile()  # kept by jax: the call finds it
            nth = f"{topic}/{len(compiled)}"
            store.wait_at_barrier(nth, int(1000 * COMPILE_LIMIT_SECS))
            compiled.add(shapes)
        return function(*args)

    return call
