"""Pipeline schedules as data: a table tick x stage -> what is done there.

A stage is a device along the mesh axis `pipeline`. It holds one chunk of the layers for
each of its virtual stages v; chunk c = v * stages + stage is the c-th in layer order.
In a tick a stage does at most one forward pass, one backward pass and one weight
gradient, in this order, each of one microbatch through one chunk. What a pass gives to
the next chunk is there in the next tick.

`make` has the named schedules; any other table that `check` accepts runs as well.
`lower` turns a table into the rows of integers that `pipeline` executes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

NAMES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
NOTHING = -1


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """Three tables [ticks, stages] of int32: `microbatch * virtual + v`, or NOTHING.

    weight: None where a backward pass makes the gradients of the weights too.
    """

    name: str
    stages: int
    virtual: int
    microbatches: int
    forward: np.ndarray
    backward: np.ndarray
    weight: np.ndarray | None = None

    @property
    def ticks(self) -> int:
        return len(self.forward)

    @property
    def chunks(self) -> int:
        return self.stages * self.virtual


class Program(NamedTuple):
    """A schedule as the executor reads it; all arrays int32, by tick, then by stage.
    `*_microbatch` and `*_virtual`: of each pass; microbatch NOTHING where there is
    none. A slot is a place in one of a stage's four stashes: x, the inputs of chunks;
    kept, what a forward pass keeps for the backward pass; dy, the gradients of outputs
    of chunks; left, what a backward pass leaves to the weight gradient. `x_in`,
    `dy_in`: where what arrives goes. Each tick puts something everywhere; what nobody
    reads goes where nothing stands that is read. enter, leave, back: the microbatch,
    the same on every stage, that enters the first chunk, leaves the last, and whose
    gradient leaves the first.
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
    enter: np.ndarray
    leave: np.ndarray
    back: np.ndarray


class Slots(NamedTuple):
    """How many each stash of a stage has, those for what nobody reads included."""

    x: int
    kept: int
    dy: int
    left: int


class Pass(NamedTuple):
    """One entry of a table."""

    tick: int
    microbatch: int
    chunk: int


def make(name: str, *, stages: int, virtual: int, microbatches: int) -> Schedule:
    """The schedule called `name`; only 'interleaved' has several virtual stages.

    gpipe: all forward, then all backward (arXiv:1811.06965). 1f1b: a backward pass as
    soon as it can be, so that at most 2 stages - 1 microbatches are in flight
    (arXiv:1806.03377). interleaved: the same over several virtual stages, which divides
    the bubble by them (arXiv:2104.04473 section 2.2). zero_bubble: 1f1b whose weight
    gradients fill the ticks in which a stage would wait (ZB-H1 of arXiv:2401.10241).
    """
    S, V, M = stages, virtual, microbatches
    if name not in NAMES:
        raise ValueError(f"{name!r} is no schedule; use one of {', '.join(NAMES)}")
    if V > 1 and name != "interleaved":
        raise ValueError(f"{name} has one virtual stage, not {V}; use interleaved")
    ms, chunks = np.arange(M)[:, None], np.arange(S * V)[None, :]
    groups, within = np.divmod(ms, S)
    v, s = np.divmod(chunks, S)
    forward_at = groups * S * V + v * S + within + s
    first_back = V * S - 1
    backward_at = first_back + groups * S * V + (V - 1 - v) * S + within + (S - 1 - s)
    weight_at = None
    if name == "gpipe":
        backward_at = (M + S - 1) + ms + (S - 1 - s)
    if name == "zero_bubble":
        # In every stage at the tick in which stage 0 is done with the microbatch.
        weight_at = np.broadcast_to(ms + 2 * (S - 1), backward_at.shape)
    ticks = 1 + int(max(backward_at.max(), 0 if weight_at is None else weight_at.max()))
    lay = functools.partial(_table, ticks=ticks, stages=S, virtual=V)
    schedule = Schedule(
        name=name,
        stages=S,
        virtual=V,
        microbatches=M,
        forward=lay(forward_at),
        backward=lay(backward_at),
        weight=None if weight_at is None else lay(weight_at),
    )
    check(schedule)
    return schedule


def forward_only(*, stages: int, virtual: int, microbatches: int) -> Schedule:
    """Forward passes alone, for evaluation."""
    whole = make(
        "interleaved", stages=stages, virtual=virtual, microbatches=microbatches
    )
    last = np.flatnonzero((whole.forward != NOTHING).any(axis=1)).max()
    forward = whole.forward[: last + 1]
    return dataclasses.replace(
        whole,
        name="forward",
        forward=forward,
        backward=np.full_like(forward, NOTHING),
    )


def check(schedule: Schedule) -> None:
    """Raises ValueError at the first broken rule, naming tick, stage and microbatch."""
    forward, backward = _ticks(schedule, "forward"), _ticks(schedule, "backward")
    last = schedule.chunks - 1
    for (m, c), tick in forward.items():
        if c and forward[m, c - 1] >= tick:
            raise _too_early(schedule, "forward", m, c, tick, "its input")
    for (m, c), tick in backward.items():
        if forward[m, c] > tick:
            raise _too_early(schedule, "backward", m, c, tick, "its forward pass")
        if c < last and backward[m, c + 1] >= tick:
            raise _too_early(schedule, "backward", m, c, tick, "its gradient")
    weight = {} if schedule.weight is None else _ticks(schedule, "weight")
    for (m, c), tick in weight.items():
        if backward[m, c] > tick:
            raise _too_early(schedule, "weight", m, c, tick, "its backward pass")


def lower(schedule: Schedule) -> tuple[Program, Slots]:
    """The rows that the executor reads, and the sizes of its stashes.

    A slot is one microbatch's from the tick in which something arrives there to the
    tick in which it is last read; slots are given out by colouring these intervals, so
    that there are as many as are in use at once, or one more.
    """
    S, M = schedule.stages, schedule.microbatches
    last = schedule.chunks - 1
    forward = {(p.microbatch, p.chunk): p.tick for p in passes(schedule, "forward")}
    backward = {(p.microbatch, p.chunk): p.tick for p in passes(schedule, "backward")}
    weight = {(p.microbatch, p.chunk): p.tick for p in passes(schedule, "weight")}
    x_spans: list[_Span] = []
    dy_spans: list[_Span] = []
    for (m, c), tick in forward.items():
        arrives = tick if c == 0 else forward[m, c - 1] + 1
        x_spans.append(_Span(c % S, arrives, tick, (m, c)))
    for (m, c), tick in backward.items():
        arrives = forward[m, c] if c == last else backward[m, c + 1] + 1
        dy_spans.append(_Span(c % S, arrives, tick, (m, c)))
    between = lambda one, other: [
        _Span(c % S, one[m, c], tick, (m, c)) for (m, c), tick in other.items()
    ]
    _check_arrivals("inputs", x_spans)
    _check_arrivals("gradients", dy_spans)
    shape = schedule.ticks, S
    x = _make_stash(x_spans, shape)
    kept = _make_stash(between(forward, backward), shape)
    dy = _make_stash(dy_spans, shape)
    left = _make_stash(between(backward, weight), shape)

    fields = {}
    for kind in ("forward", "backward", "weight"):
        microbatch, virtual = np.full(shape, NOTHING, np.int32), np.zeros(shape, int)
        for tick, m, c in passes(schedule, kind):
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
        forward_kept=kept.put,
        backward_kept=kept.read,
        dy_in=dy.put,
        backward_dy=dy.read,
        backward_left=left.put,
        weight_left=left.read,
    )
    return program, Slots(x.slots, kept.slots, dy.slots, left.slots)


def passes(schedule: Schedule, kind: str) -> Iterator[Pass]:
    """What is done of `kind` (forward, backward, weight), by tick and stage."""
    table = getattr(schedule, kind)
    if table is None:
        return
    for tick, stage in zip(*np.nonzero(table != NOTHING), strict=True):
        m, v = divmod(int(table[tick, stage]), schedule.virtual)
        yield Pass(int(tick), m, v * schedule.stages + int(stage))


def has_backward(schedule: Schedule) -> bool:
    """Whether there are backward passes: not in evaluation."""
    return bool((schedule.backward != NOTHING).any())


def in_flight(schedule: Schedule) -> int:
    """The most microbatches in a chunk, each from its forward pass to its backward
    pass, for which one stage keeps something at once."""
    held_TS = np.zeros((schedule.ticks + 1, schedule.stages), int)
    for sign, kind, after in ((1, "forward", 0), (-1, "backward", 1)):
        for tick, _, chunk in passes(schedule, kind):
            held_TS[tick + after, chunk % schedule.stages] += sign
    return int(np.cumsum(held_TS, axis=0).max())


def bubble(
    schedule: Schedule, *, forward: float = 1.0, backward: float = 1.0, weight=1.0
) -> float:
    """The part of the time in which a stage waits, where these are the costs of a pass
    through one chunk and a tick takes as long as its busiest stage.

    A backward pass that makes the gradients of the weights too costs both.
    """
    joint = 0.0 if schedule.weight is not None else weight
    tables = [(schedule.forward, forward), (schedule.backward, backward + joint)]
    if schedule.weight is not None:
        tables.append((schedule.weight, weight))
    work_TS = sum(cost * (table != NOTHING) for table, cost in tables)
    total = work_TS.max(axis=1).sum()
    return float(1.0 - work_TS.mean(axis=1).sum() / total)


def draw(schedule: Schedule, *, ticks: int = 40) -> str:
    """The table as text: a line for each stage and kind of pass, a column for each
    tick, in it the microbatch, and the virtual stage as a letter where there are
    several. Columns beyond `ticks` are left out."""
    S, V = schedule.stages, schedule.virtual
    tables = {"forward": schedule.forward, "backward": schedule.backward}
    if schedule.weight is not None:
        tables["weight"] = schedule.weight
    cells = {kind: [[_cell(x, V) for x in row] for row in table[:ticks].T]
             for kind, table in tables.items()}  # fmt: skip
    width = max(len(cell) for rows in cells.values() for row in rows for cell in row)
    more = "" if schedule.ticks <= ticks else f" ... {schedule.ticks - ticks} more"
    lines = [
        f"{schedule.name}: {S} stages x {V} virtual, {schedule.microbatches} "
        f"microbatches, {schedule.ticks} ticks, bubble {bubble(schedule):.1%}, at most "
        f"{in_flight(schedule)} in flight"
    ]
    for stage in range(S):
        for kind, rows in cells.items():
            name = f"stage {stage}" if kind == "forward" else ""
            line = " ".join(cell.rjust(width) for cell in rows[stage])
            lines.append(f"{name:<9}{kind:<9} {line}{more}")
    return "\n".join(lines)


# Arrays that are the same on every stage.
_GLOBAL = ("enter", "leave", "back")


class _Span(NamedTuple):
    """Ticks from first to last, both included, in which a stage keeps something."""

    stage: int
    first: int
    last: int
    item: tuple[int, int]


def _table(at_MC: np.ndarray, *, ticks: int, stages: int, virtual: int) -> np.ndarray:
    """[ticks, stages] from the tick of every microbatch in every chunk."""
    table = np.full((ticks, stages), NOTHING, np.int32)
    for (m, c), tick in np.ndenumerate(at_MC):
        v, s = divmod(c, stages)
        if table[tick, s] != NOTHING:
            raise ValueError(f"tick {tick} of stage {s} would have two passes")
        table[tick, s] = m * virtual + v
    return table


def _ticks(schedule: Schedule, kind: str) -> dict[tuple[int, int], int]:
    """(microbatch, chunk) -> tick; each there once, else ValueError."""
    done: dict[tuple[int, int], int] = {}
    for tick, m, c in passes(schedule, kind):
        if (m, c) in done:
            raise ValueError(
                f"{kind} of microbatch {m} in chunk {c} is done at ticks "
                f"{done[m, c]} and {tick}; once is right"
            )
        done[m, c] = tick
    expected = {
        (m, c) for m in range(schedule.microbatches) for c in range(schedule.chunks)
    }
    if missing := sorted(expected - done.keys()):
        m, c = missing[0]
        raise ValueError(f"{kind} of microbatch {m} in chunk {c} is never done")
    if unknown := sorted(done.keys() - expected):
        raise ValueError(
            f"{kind} of microbatch {unknown[0][0]} is done; there are "
            f"{schedule.microbatches}"
        )
    return done


def _too_early(schedule, kind, m, c, tick, what) -> ValueError:
    return ValueError(
        f"{kind} of microbatch {m} in chunk {c} (stage {c % schedule.stages}) is at "
        f"tick {tick}, before {what} is there"
    )


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
    """put, read: [ticks, stages], the slot in which a tick puts, and reads, something.
    slots: how many there are."""

    put: np.ndarray
    read: np.ndarray
    slots: int


def _make_stash(spans: Sequence[_Span], shape: tuple[int, int]) -> _Stash:
    """By first tick, each span takes the lowest free slot of its stage, put there in
    its first tick and read in its last. What else is put goes where nothing is kept."""
    put, read = np.full(shape, NOTHING, np.int32), np.zeros(shape, np.int32)
    in_use = np.zeros((shape[0] + 1, shape[1]), int)
    for stage, first, last, _ in spans:
        in_use[first, stage] += 1
        in_use[last + 1, stage] -= 1
    is_busy = np.zeros((*shape, 1 + int(np.cumsum(in_use, axis=0).max())), bool)
    for stage, first, last, _ in sorted(spans, key=lambda span: span.first):
        slot = int(np.argmin(is_busy[first, stage]))
        is_busy[first : last + 1, stage, slot] = True
        put[first, stage], read[last, stage] = slot, slot
    put = np.where(put == NOTHING, np.argmin(is_busy, axis=2), put).astype(np.int32)
    return _Stash(put, read, 1 + int(put.max(initial=0)))


def _cell(entry: int, virtual: int) -> str:
    if entry == NOTHING:
        return "."
    m, v = divmod(int(entry), virtual)
    return f"{m}{chr(ord('a') + v)}" if virtual > 1 else str(m)
