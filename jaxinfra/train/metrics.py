"""Metrics on their way from the device to the journal, read one step late.

Reading a step's scalars waits for the step; one step later they are there already, and
the device never waits for the host.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxinfra.train.journal import Journal


class Read(NamedTuple):
    """What the loop must know of a step that was read."""

    is_stop: bool = False
    has_diverged: bool = False


class Reader:
    """Metrics on their way from the device to the journal, one step late."""

    def __init__(
        self,
        journal: Journal,
        *,
        lr: Callable[[int], float],
        max_bad_steps: int,
        flops_per_step: float,
        peak_flops: float | None,
    ):
        self._journal, self._lr = journal, lr
        self._max_bad_steps = max_bad_steps
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._pending: tuple[int, Any, Any, float] | None = None
        self._bad_steps = 0
        self._settled_secs: float | None = None
        self._clock: float | None = None  # when the last step was read; None: no figure

    def push(self, step: int, metrics: Any, vote: Any, wait_secs: float) -> Read:
        """Takes what step `step` will give; reads the step before."""
        read = self.flush({}, following=metrics)
        self._pending = (step, metrics, vote, wait_secs)
        return read

    def settle(self) -> None:
        """Waits for the pending step; what the caller does next is not its time."""
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])
            self._settled_secs = time.perf_counter()

    def flush(self, extra: dict[str, float], following: Any = None) -> Read:
        """Reads what is pending, with `extra` metrics of the same step; `following` is
        what the next step will give, if that is dispatched."""
        if self._pending is None:
            return Read()
        (step, metrics, vote, wait_secs), self._pending = self._pending, None
        values = {name: x.item() for name, x in jax.device_get(metrics).items()}
        # A small step on CPU runs while it is dispatched: then the two share the time.
        num_ended = 1 + _has_ended(following)
        record = self._record(step, values, wait_secs, num_ended) | extra
        if "eval/held_out/loss" in extra:
            record["eval/loss"] = extra["eval/held_out/loss"]
        self._journal.step(record)
        self._bad_steps = 0 if values["is_finite"] else self._bad_steps + 1
        if not values["is_finite"]:
            self._journal.event(
                "anomaly", step=step, reason="loss or gradient not finite"
            )
        has_diverged = self._bad_steps >= self._max_bad_steps
        return Read(bool(jax.device_get(vote)), has_diverged)

    def restart_clock(self) -> None:
        """Evaluation and saves are not part of a step's time."""
        self._clock = time.perf_counter()

    def _record(
        self, step: int, values: dict[str, Any], wait_secs: float, num_ended: int
    ) -> dict[str, Any]:
        record: dict[str, Any] = {"step": step}
        names = {"digest": "data/digest", "padding_frac": "data/padding_frac"}
        for name, value in values.items():
            record[names.get(name, f"train/{name}")] = value
        record["train/lr"] = self._lr(step - 1)
        record["data/wait_secs"] = wait_secs
        now, self._settled_secs = self._settled_secs or time.perf_counter(), None
        if self._clock is not None:
            secs = (now - self._clock) / num_ended
            now = self._clock + secs
            record["perf/step_secs"] = secs
            record["perf/tokens_per_sec"] = values["tokens"] / secs
            if self._peak_flops:
                rate = self._flops_per_step / secs
                record["perf/mfu"] = rate / self._peak_flops
        self._clock = now
        return record


def _has_ended(metrics: Any) -> bool:
    leaves = jax.tree.leaves(metrics)
    return bool(leaves) and all(leaf.is_ready() for leaf in leaves)
