"""How the processes of one job agree: about a save, a restore, the step to stop after.

`jax.distributed`'s coordination service holds a small key-value store that works
from any thread and needs no devices, so a save can agree behind a running step
(a collective could not). Two moves are enough:

- `contribute`, then `collect`: each does its part, the first process hears of all;
- `from_first`: the first process acts, all get what it returned, or its error.

`make_ballot` is for what is asked at every step: a tiny program on the devices, queued
like the step itself, so every process reads the same answer for the same step and
nobody waits for a message.

A topic is used once, and in the same order by all processes. Values are JSON.

Limits: the store is `jax._src.distributed.global_state.client`, the project's one
private import, since jax has no public name for it. A contribution stays in the
coordinator's memory until it is collected, the first's answers (short) for good.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed

from jaxinfra.config import ConfigError

_LOG = logging.getLogger(__name__)


class GroupError(Exception):
    """An action failed in some process; `kind` is the class name of its error."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


class KeyValueStore(Protocol):
    """What is used of the coordination service's client."""

    def key_value_set(self, key: str, value: str) -> None: ...
    def key_value_delete(self, key: str) -> None: ...
    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


class _OneProcess:
    """The store of a job with one process: what is asked for was set before."""

    def __init__(self):
        self._values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        self._values[key] = value

    def key_value_delete(self, key: str) -> None:
        self._values.pop(key, None)

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        del timeout_in_ms
        return self._values[key]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """The processes of this job, seen from one of them; by default there is one.

    `timeout_secs` bounds the wait for the slowest process's part of a save.
    """

    rank: int = 0
    size: int = 1
    timeout_secs: float = 600.0
    store: KeyValueStore = dataclasses.field(default_factory=_OneProcess)

    def contribute(self, topic: str, action: Callable[[], Any]) -> None:
        """Runs `action` here and tells the first process its value, or its error."""
        self.store.key_value_set(f"{topic}/{self.rank}", _outcome(action))

    def collect(self, topic: str) -> list[Any]:
        """What every process contributed, by rank; only the first process asks.

        Raises:
          GroupError: naming the rank that failed, or that did not answer in time.
        """
        deadline = time.monotonic() + self.timeout_secs
        values = []
        for rank in range(self.size):
            who = f"rank {rank}" if self.size > 1 else ""
            text = self._wait(f"{topic}/{rank}", deadline - time.monotonic(), who)
            self.store.key_value_delete(f"{topic}/{rank}")
            values.append(_value(text, who))
        return values

    def from_first(self, topic: str, action: Callable[[], Any]) -> Any:
        """The value of `action`, run by the first process alone, in all processes.

        Raises:
          GroupError: in all processes, when it failed there.
        """
        if self.rank == 0:
            text = _outcome(action)
            if self.size > 1:
                self.store.key_value_set(topic, text)
        else:
            # Twice: the first process may itself wait that long for the others.
            text = self._wait(topic, 2 * self.timeout_secs + 10, "rank 0")
        return _value(text, "")

    def _wait(self, key: str, secs: float, who: str) -> str:
        try:
            return self.store.blocking_key_value_get(key, max(1, int(secs * 1000)))
        except jax.errors.JaxRuntimeError as error:
            message = f"{who}: no answer within {secs:.0f} s ({error})"
            raise GroupError(message, "Timeout") from error


def this_job(*, timeout_secs: float = 600.0) -> ProcessGroup:
    """The group that `jax.distributed.initialize` made, or that of one process."""
    client = distributed.global_state.client
    if client is None and jax.process_count() > 1:
        raise ConfigError(
            f"this is one of {jax.process_count()} processes that do not know each "
            "other; set runtime.coordinator, runtime.num_processes and "
            "runtime.process_id"
        )
    if client is None or jax.process_count() == 1:
        return ProcessGroup(timeout_secs=timeout_secs)
    return ProcessGroup(
        rank=jax.process_index(),
        size=jax.process_count(),
        timeout_secs=timeout_secs,
        store=client,
    )


def make_ballot(mesh: jax.sharding.Mesh) -> Callable[[bool], Any]:
    """ballot(wants) -> whether any process wants to stop; a device value where there
    are several processes, to be read later."""
    if jax.process_count() == 1:
        return lambda wants: wants
    votes = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    count = jax.jit(jnp.max, out_shardings=jax.NamedSharding(mesh, jax.P()))

    def ballot(wants: bool) -> jax.Array:
        mine = np.full((1,), wants, np.int32)
        shape = (mesh.size,)
        return count(jax.make_array_from_callback(shape, votes, lambda index: mine))

    return ballot


def _outcome(action: Callable[[], Any]) -> str:
    """`action`'s value or its error: an answer either way, so that nobody waits."""
    try:
        return json.dumps({"value": action()})
    except Exception as error:
        _LOG.debug("told to the other processes", exc_info=True)
        if isinstance(error, GroupError):
            return json.dumps({"error": str(error), "kind": error.kind})
        kind = type(error).__name__
        return json.dumps({"error": f"{kind}: {error}", "kind": kind})


def _value(text: str, who: str) -> Any:
    outcome = json.loads(text)
    if "error" in outcome:
        message = f"{who}: {outcome['error']}" if who else outcome["error"]
        raise GroupError(message, outcome["kind"])
    return outcome["value"]
