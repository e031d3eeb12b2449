"""Pipeline schedules as data: a table tick x stage -> what is done there.

A stage is a device along the mesh axis `pipeline`. It holds one chunk of the layers for
each of its virtual stages v; chunk c = v * stages + stage is the c-th in layer order.
In a tick a stage does at most one forward pass, one backward pass and one weight
gradient, in this order, each of one microbatch through one chunk. What a pass gives to
the next chunk is there in the next tick.

`make` has the named schedules; any other table that `check` accepts runs as well.
`lowering` turns a table into the rows of integers that `pipeline` executes.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple, assert_never

import numpy as np

from jaxinfra import slices
from jaxinfra.config import Config

NAMES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
NOTHING = -1

# Of a tick, in this order: something goes to the partner, a forward pass puts what it
# keeps, a backward pass reads what was kept, what the partner sent is put.
MOMENTS = 4
SEND, PUT, READ, GET = range(MOMENTS)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """Three tables [ticks, stages] of int32: `microbatch * virtual + v`, or NOTHING.

    weight: None where a backward pass makes the gradients of the weights too. away: of
    the first half of the stages, for how many ticks what a stage keeps is with its
    partner; () or zeros where all is kept at home. See `balanced`.
    """

    name: str
    stages: int
    virtual: int
    microbatches: int
    forward: np.ndarray
    backward: np.ndarray
    weight: np.ndarray | None = None
    away: tuple[int, ...] = ()

    @property
    def is_balanced(self) -> bool:
        return any(self.away)

    @property
    def ticks(self) -> int:
        return len(self.forward)

    @property
    def chunks(self) -> int:
        return self.stages * self.virtual


class Pass(NamedTuple):
    """One entry of a table."""

    tick: int
    microbatch: int
    chunk: int


def schedule_of(config: Config, stages: int) -> Schedule:
    """The schedule of config.parallel, over so many stages."""
    parallel, train = config.parallel, config.train
    schedule = make(
        parallel.schedule,
        stages=stages,
        virtual=parallel.virtual_stages,
        microbatches=train.microbatches,
    )
    match parallel.balanced:
        case "auto":
            keeps_little = parallel.recompute or train.remat == "full"
            sizes = {"data": config.mesh.data, "pipeline": stages}
            is_slow = slices.slow_axis(sizes, config.mesh.slices) == "pipeline"
            is_fit = keeps_little and not is_slow
            return balanced(schedule) if is_fit else schedule
        case "true":
            return balanced(schedule)
        case "false":
            return schedule
        case _:
            assert_never(parallel.balanced)


def make(name: str, *, stages: int, virtual: int, microbatches: int) -> Schedule:
    """The schedule called `name`; only 'interleaved' has several virtual stages.

    gpipe: all forward, then all backward (arXiv:1811.06965). 1f1b: a backward pass as
    soon as it can be, so that at most 2 stages - 1 microbatches are under way
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
    half = schedule.stages // 2
    if len(schedule.away) > half or min(schedule.away, default=0) < 0:
        raise ValueError(
            f"away={schedule.away} must be ticks, of at most the first {half} of "
            f"{schedule.stages} stages, which have a partner further on"
        )


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


def balanced(schedule: Schedule) -> Schedule:
    """The same passes, where what the early stages keep is in part with the late ones.

    By 1f1b stage s keeps 2 (S - s) - 1 microbatches, and every device has room for as
    many as the first. So what stage s keeps is with its partner S - 1 - s for some
    ticks, as many as make both keep about S. Each tick a stage sends its partner what
    one pass kept, and gets as much (BPipe, Kim et al., ICML 2023).
    """
    S, schedule = schedule.stages, dataclasses.replace(schedule, away=())
    most_S, spans = _most_kept(schedule), keeping(schedule)
    if (most_S == most_S[::-1]).all():
        return schedule
    life = 1 + int((spans[:, 2] - spans[:, 1]).max(initial=0)) // MOMENTS
    most_ES = np.stack(
        [
            _most_kept(dataclasses.replace(schedule, away=(ticks,) * (S // 2)))
            for ticks in range(life)
        ]
    )
    of_pairs = np.maximum(most_ES, most_ES[:, ::-1])[:, : S // 2]
    return dataclasses.replace(schedule, away=tuple(map(int, of_pairs.argmin(axis=0))))


def keeping(schedule: Schedule) -> np.ndarray:
    """When stages keep what forward passes keep, [spans, 3]: a stage, the first and the
    last moment of its ticks, both included."""
    if not has_backward(schedule):
        return np.zeros((0, 3), int)
    begun_MC, ended_MC = _ticks_of(schedule, "forward"), _ticks_of(schedule, "backward")
    S, stage = schedule.stages, np.arange(schedule.chunks) % schedule.stages
    away = np.array([*schedule.away, *[0] * (S - len(schedule.away))])[stage]
    put, read = begun_MC * MOMENTS + PUT, ended_MC * MOMENTS + READ
    there, back = (begun_MC + 1) * MOMENTS, (begun_MC + 1 + away) * MOMENTS
    is_lent = (there < back) & (back + GET < read)
    spans = [
        (stage, put, np.where(is_lent, there + SEND, read)),
        (S - 1 - stage, there + GET, back + SEND),
        (stage, back + GET, read),
    ]
    own, *lent = (np.stack(np.broadcast_arrays(*span), axis=-1) for span in spans)
    return np.concatenate([own.reshape(-1, 3), *(span[is_lent] for span in lent)])


def in_use(spans: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[times, stages], from the shape: how many things a stage keeps then. spans: as
    `keeping` has them."""
    stage, first, last = np.asarray(spans, int).reshape(-1, 3).T
    change = np.zeros((shape[0] + 1, shape[1]), int)
    np.add.at(change, (first, stage), 1)
    np.add.at(change, (last + 1, stage), -1)
    return np.cumsum(change, axis=0)[:-1]


def most_kept(schedule: Schedule) -> int:
    """The most microbatches in a chunk, each from its forward pass to its backward
    pass, for which one stage keeps something at once."""
    return int(_most_kept(schedule).max())


def _most_kept(schedule: Schedule) -> np.ndarray:
    """[stages]"""
    shape = schedule.ticks * MOMENTS, schedule.stages
    return in_use(keeping(schedule), shape).max(axis=0)


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
        f"microbatches, {schedule.ticks} ticks, bubble {bubble(schedule):.1%}, a stage "
        f"keeps at most {most_kept(schedule)}"
    ]
    if schedule.is_balanced:
        lent = (f"{s} to {S - 1 - s}: {ticks}" for s, ticks in enumerate(schedule.away))
        lines.append(f"stage lends to stage, for ticks: {', '.join(lent)}")
    for stage in range(S):
        for kind, rows in cells.items():
            name = f"stage {stage}" if kind == "forward" else ""
            line = " ".join(cell.rjust(width) for cell in rows[stage])
            lines.append(f"{name:<9}{kind:<9} {line}{more}")
    return "\n".join(lines)


def _ticks_of(schedule: Schedule, kind: str) -> np.ndarray:
    """[microbatches, chunks]"""
    table = getattr(schedule, kind)
    tick, stage = np.nonzero(table != NOTHING)
    m, v = np.divmod(table[tick, stage], schedule.virtual)
    at_MC = np.zeros((schedule.microbatches, schedule.chunks), int)
    at_MC[m, v * schedule.stages + stage] = tick
    return at_MC


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


def _cell(entry: int, virtual: int) -> str:
    if entry == NOTHING:
        return "."
    m, v = divmod(int(entry), virtual)
    return f"{m}{chr(ord('a') + v)}" if virtual > 1 else str(m)
