"""A schedule as the executor reads it: rows of integers, and where things are kept.

What a stage keeps from one tick to another lies in stashes, arrays of slots. A slot is
one thing's from when it is put there to when it is last read; slots are given out by
colouring these spans, so that there are as many as are in use at once, or one more.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxinfra.parallel import schedules
from jaxinfra.parallel.schedules import GET, MOMENTS, NOTHING, PUT, READ, SEND


class Program(NamedTuple):
    """All arrays int32, by tick, then by stage. `*_microbatch` and `*_virtual`: of each
    pass; microbatch NOTHING where there is none. The four stashes of a stage: x, the
    inputs of chunks; kept, what a forward pass keeps for the backward pass; dy, the
    gradients of outputs of chunks; left, what a backward pass leaves to the weight
    gradient. `x_in`, `dy_in`: the slot where what arrives goes. kept_out, kept_in: what
    goes to the partner, and where what comes from it goes, of a balanced schedule. Each
    tick puts something everywhere; what nobody reads goes where nothing stands that is
    read. enter, leave, back: the microbatch, the same on every stage, that enters the
    first chunk, leaves the last, and whose gradient leaves the first.
    """

    forward_microbatch: np.ndarray
    forward_virtual: np.ndarray
    forward_x: np.ndarray
    forward_kept: np.ndarray
    backward_microbatch: np.ndarray
    backward_virtual: np.ndarray
    backward_kept: np.ndarray
    backward_dy: np.ndarray
    backward_left: np.ndarray
    weight_microbatch: np.ndarray
    weight_virtual: np.ndarray
    weight_left: np.ndarray
    x_in: np.ndarray
    dy_in: np.ndarray
    kept_out: np.ndarray
    kept_in: np.ndarray
    enter: np.ndarray
    leave: np.ndarray
    back: np.ndarray


class Slots(NamedTuple):
    """How many each stash of a stage has, those for what nobody reads included."""

    x: int
    kept: int
    dy: int
    left: int


def lower(schedule: schedules.Schedule) -> tuple[Program, Slots]:
    """The rows that the executor reads, and the sizes of its stashes."""
    S, M = schedule.stages, schedule.microbatches
    last = schedule.chunks - 1
    forward, backward, weight = (
        {(p.microbatch, p.chunk): p.tick for p in schedules.passes(schedule, kind)}
        for kind in ("forward", "backward", "weight")
    )
    x_spans: list[_Span] = []
    dy_spans: list[_Span] = []
    for (m, c), tick in forward.items():
        arrives = tick if c == 0 else forward[m, c - 1] + 1
        x_spans.append(_Span(c % S, arrives, tick))
    for (m, c), tick in backward.items():
        arrives = forward[m, c] if c == last else backward[m, c + 1] + 1
        dy_spans.append(_Span(c % S, arrives, tick))
    left_spans = [_Span(c % S, backward[m, c], tick) for (m, c), tick in weight.items()]
    _check_arrivals("inputs", x_spans)
    _check_arrivals("gradients", dy_spans)
    shape = schedule.ticks, S
    x, dy = _make_stash(x_spans, shape), _make_stash(dy_spans, shape)
    left = _make_stash(left_spans, shape)
    kept = _make_stash(schedules.keeping(schedule), (schedule.ticks * MOMENTS, S))
    at = lambda table, moment: table[moment::MOMENTS]

    fields = {}
    for kind in ("forward", "backward", "weight"):
        microbatch, virtual = np.full(shape, NOTHING, np.int32), np.zeros(shape, int)
        for tick, m, c in schedules.passes(schedule, kind):
            microbatch[tick, c % S], virtual[tick, c % S] = m, c // S
        fields[f"{kind}_microbatch"] = microbatch
        fields[f"{kind}_virtual"] = virtual.astype(np.int32)
    fields |= {name: np.full(schedule.ticks, NOTHING, np.int32) for name in _GLOBAL}
    for m in range(M):
        fields["enter"][forward[m, 0]] = m
        fields["leave"][forward[m, last]] = m
        if backward:
            fields["back"][backward[m, 0]] = m
    program = Program(
        **fields,
        x_in=x.put,
        forward_x=x.read,
        forward_kept=at(kept.put, PUT),
        kept_out=at(kept.read, SEND),
        backward_kept=at(kept.read, READ),
        kept_in=at(kept.put, GET),
        dy_in=dy.put,
        backward_dy=dy.read,
        backward_left=left.put,
        weight_left=left.read,
    )
    count = lambda put: 1 + int(put.max(initial=0))
    num_kept = count(program.forward_kept)
    if schedule.is_balanced:
        num_kept = max(num_kept, count(program.kept_in))
    return program, Slots(count(x.put), num_kept, count(dy.put), count(left.put))


# Arrays that are the same on every stage.
_GLOBAL = ("enter", "leave", "back")


class _Span(NamedTuple):
    """Times from first to last, both included, in which a stage keeps something."""

    stage: int
    first: int
    last: int


def _check_arrivals(what: str, spans: Sequence[_Span]) -> None:
    """One thing at a time can be put into a stash."""
    seen: set[tuple[int, int]] = set()
    for span in spans:
        if (span.stage, span.first) in seen:
            raise ValueError(
                f"stage {span.stage} would get two {what} at tick {span.first}; one "
                "of them must be made at another"
            )
        seen.add((span.stage, span.first))


class _Stash(NamedTuple):
    """put, read: [times, stages], the slot in which something is put, and read."""

    put: np.ndarray
    read: np.ndarray


def _make_stash(spans: Sequence[_Span] | np.ndarray, shape: tuple[int, int]) -> _Stash:
    """By first time, each span takes the lowest free slot of its stage, put there in
    its first time and read in its last. What else is put goes where nothing is kept."""
    put, read = np.full(shape, NOTHING, np.int32), np.zeros(shape, np.int32)
    in_use = schedules.in_use(spans, shape)
    is_busy = np.zeros((*shape, 1 + int(in_use.max())), bool)
    for stage, first, last in sorted(spans, key=lambda span: span[1]):
        slot = int(np.argmin(is_busy[first, stage]))
        is_busy[first : last + 1, stage, slot] = True
        put[first, stage], read[last, stage] = slot, slot
    put = np.where(put == NOTHING, np.argmin(is_busy, axis=2), put).astype(np.int32)
    return _Stash(put, read)
