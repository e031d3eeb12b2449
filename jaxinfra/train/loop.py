"""The training loop: step n is dispatched before the metrics of n - 1 are read.

Only at boundaries (evaluation, save, end) does the host wait for the device. Metrics up
to step s are written before the save of s begins, which syncs them before it commits.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax

from jaxinfra.checkpoint.commits import SaveError
from jaxinfra.resilience import exitcodes
from jaxinfra.train.journal import Journal, Reader
from jaxinfra.train.state import TrainState


class Fetched(Protocol):
    """A batch and how long the loop waited for it."""

    batch: Any
    wait_secs: float


class Saver(Protocol):
    """Asynchronous saves; each call may raise the SaveError of an earlier save."""

    def save(self, step: int, state: TrainState) -> None: ...
    def poll(self) -> list[Any]: ...
    def close(self) -> list[Any]: ...


class Hooks(NamedTuple):
    """What the loop calls besides the step.

    evaluate(state) -> metrics. ballot(wants_stop) -> device value that is true if any
    process wants to stop. stop_wanted() -> why this process does, or None.
    profile(step) is called before every step, counted from 0.
    """

    evaluate: Callable[[TrainState], dict[str, float]]
    ballot: Callable[[bool], Any]
    stop_wanted: Callable[[], str | None]
    profile: Callable[[int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """When what happens, in steps done; see config.TrainConfig and EvalConfig."""

    steps: int
    save_every: int
    eval_every: int
    max_bad_steps: int
    flops_of: Callable[[int], float]  # of step k, counted from 0
    peak_flops: float | None  # of all devices together; None: not known

    def is_save(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.steps

    def is_eval(self, step: int) -> bool:
        every = self.eval_every
        return step == self.steps or (every > 0 and step % every == 0)


def run(
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batches: Iterator[Fetched],
    *,
    start: int,
    schedule: Schedule,
    hooks: Hooks,
    saver: Saver,
    journal: Journal,
    lr: Callable[[int], float],
) -> tuple[TrainState, int]:
    """Trains from `start` steps done to the end, or to a reason to stop.

    Returns the state and an exit code: DONE, PREEMPTED (after a committed save),
    DIVERGED, or SAVE_FAILED if the last save is not committed.
    """
    reader = Reader(
        journal,
        lr=lr,
        max_bad_steps=schedule.max_bad_steps,
        flops_of=schedule.flops_of,
        peak_flops=schedule.peak_flops,
    )
    step, code = start, exitcodes.DONE
    for fetched in batches:
        hooks.profile(step)
        began_secs = time.perf_counter()
        state, values = train_step(state, fetched.batch)
        if step == start:  # The first call compiles, or reads the cache of programs.
            journal.event("compile", secs=time.perf_counter() - began_secs)
        step += 1
        is_last = step == schedule.steps
        vote = hooks.ballot(hooks.stop_wanted() is not None)
        late = reader.push(step, values, vote, fetched.wait_secs)
        _tell_saves(saver.poll, journal)  # one that failed is tried again by the next
        is_boundary = schedule.is_save(step) or schedule.is_eval(step)
        if is_boundary or late.is_stop:
            reader.settle()
            # Who is asked to stop has no time to evaluate, unless it is the last step.
            is_eval = schedule.is_eval(step) and (not late.is_stop or is_last)
            late = late.merged(reader.flush(hooks.evaluate(state) if is_eval else {}))
        if late.has_diverged:
            code = exitcodes.DIVERGED
            break
        if schedule.is_save(step) or late.is_stop:
            _tell_saves(saver.wait, journal)
            saver.save(step, state)
        if is_boundary:
            reader.restart_clock()
        if late.is_stop and not is_last:
            reason = hooks.stop_wanted() or "a peer's"
            journal.event("preemption", step=step, reason=reason)
            code = exitcodes.PREEMPTED
            break
    is_cut = step < schedule.steps and code == exitcodes.DONE  # no batch came
    last = reader.flush({})
    if last.has_diverged:
        code = exitcodes.DIVERGED
    elif is_cut:
        if step > start and not schedule.is_save(step):
            _tell_saves(saver.wait, journal)
            saver.save(step, state)
        reason = hooks.stop_wanted() or "its data cannot be had"
        journal.event("preemption", step=step, reason=reason)
        code = exitcodes.PREEMPTED
    if not _tell_saves(saver.close, journal):
        code = exitcodes.SAVE_FAILED
    return state, code


def _tell_saves(ended: Callable[[], list[Any]], journal: Journal) -> bool:
    """Events of the saves that `ended` gives; whether all of them were committed."""
    try:
        for report in ended():
            journal.event("save", **dataclasses.asdict(report))
    except SaveError as error:
        journal.event("save_failed", reason=str(error))
        journal.say(f"save failed: {error}")
        return False
    return True
