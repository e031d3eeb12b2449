"""Schedules as tables: valid for every size, known bubbles, bounded stashes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfra import config
from jaxinfra.parallel import lowering, schedules

STAGES, MICROBATCHES, VIRTUALS = (
    st.integers(1, 7),
    st.integers(1, 19),
    st.integers(1, 4),
)
PLAIN = ("gpipe", "1f1b", "zero_bubble")


def made(name, *, stages=4, virtual=1, microbatches=6):
    return schedules.make(
        name, stages=stages, virtual=virtual, microbatches=microbatches
    )


@st.composite
def any_schedule(draw):
    name = draw(st.sampled_from(schedules.NAMES))
    virtual = draw(VIRTUALS) if name == "interleaved" else 1
    schedule = made(
        name, stages=draw(STAGES), virtual=virtual, microbatches=draw(MICROBATCHES)
    )
    # Not as `balanced` has it: whatever is right for one is right for it too.
    away = draw(st.lists(st.integers(0, 9), max_size=schedule.stages // 2))
    schedule = dataclasses.replace(schedule, away=tuple(away))
    schedules.check(schedule)
    return schedule


@given(any_schedule())
def test_every_pass_is_done_once_and_after_what_it_needs(schedule):
    """Written again, from the definition: chunk c is on stage c % S, as its v = c // S
    virtual stage."""
    S, V, M = schedule.stages, schedule.virtual, schedule.microbatches
    at = {}
    kinds = {"forward": schedule.forward, "backward": schedule.backward}
    if schedule.weight is not None:
        kinds["weight"] = schedule.weight
    for kind, table in kinds.items():
        for tick in range(schedule.ticks):
            for s in range(S):
                if (entry := table[tick, s]) >= 0:
                    key = (kind, entry // V, entry % V * S + s)
                    assert key not in at
                    at[key] = tick
    assert len(at) == len(kinds) * M * S * V
    for m in range(M):
        for c in range(S * V):
            if c:
                assert at["forward", m, c - 1] < at["forward", m, c]
                assert at["backward", m, c] < at["backward", m, c - 1]
            assert at["forward", m, c] <= at["backward", m, c]
            if "weight" in kinds:
                assert at["backward", m, c] <= at["weight", m, c]


@given(any_schedule())
def test_what_is_read_from_a_slot_is_what_was_put_there(schedule):
    """Plays the lowered rows with numbers for activations."""
    program, slots = lowering.lower(schedule)
    S, V = schedule.stages, schedule.virtual
    last = S * V - 1
    stashes = [[{} for _ in range(S)] for _ in range(4)]
    came_x, came_dy = [None] * S, [None] * S
    for t in range(schedule.ticks):
        done_x, done_dy = [None] * S, [None] * S
        lent = [stashes[1][s].get(program.kept_out[t, s]) for s in range(S)][::-1]
        for s in range(S):
            x, kept, dy, left = (stash[s] for stash in stashes)
            enters = program.enter[t] >= 0 and s == 0
            x[program.x_in[t, s]] = (program.enter[t], 0) if enters else came_x[s]
            kept_now = left_now = None
            if (m := program.forward_microbatch[t, s]) >= 0:
                c = program.forward_virtual[t, s] * S + s
                assert x[program.forward_x[t, s]] == (m, c)
                done_x[s], kept_now = (m, c + 1), (m, c)
            kept[program.forward_kept[t, s]] = kept_now
            leaves = program.leave[t] >= 0 and s == S - 1
            if leaves:
                assert done_x[s] == (program.leave[t], last + 1)
            dy[program.dy_in[t, s]] = (program.leave[t], last) if leaves else came_dy[s]
            if (m := program.backward_microbatch[t, s]) >= 0:
                c = program.backward_virtual[t, s] * S + s
                assert kept[program.backward_kept[t, s]] == (m, c)
                assert dy[program.backward_dy[t, s]] == (m, c)
                done_dy[s], left_now = (m, c - 1), (m, c)
            if schedule.is_balanced:
                kept[program.kept_in[t, s]] = lent[s]
            left[program.backward_left[t, s]] = left_now
            if (m := program.weight_microbatch[t, s]) >= 0:
                c = program.weight_virtual[t, s] * S + s
                assert left[program.weight_left[t, s]] == (m, c)
            if program.back[t] >= 0 and s == 0:
                assert done_dy[s] == (program.back[t], -1)
        came_x = [done_x[(s - 1) % S] for s in range(S)]
        came_dy = [done_dy[(s + 1) % S] for s in range(S)]
    for table, count in (
        (program.x_in, slots.x),
        (
            np.maximum(program.forward_kept, schedule.is_balanced * program.kept_in),
            slots.kept,
        ),
        (program.dy_in, slots.dy),
        (program.backward_left, slots.left),
    ):
        assert 0 <= table.min() <= table.max() == count - 1
    if schedules.has_backward(schedule):
        assert schedules.most_kept(schedule) <= slots.kept
        assert slots.kept <= schedules.most_kept(schedule) + 1


@given(STAGES, MICROBATCHES)
def test_1f1b_keeps_as_many_as_the_stages_say_and_gpipe_all(stages, microbatches):
    sizes = {"stages": stages, "microbatches": microbatches}
    most = min(microbatches, 2 * stages - 1)
    assert schedules.most_kept(made("1f1b", **sizes)) == most
    assert schedules.most_kept(made("zero_bubble", **sizes)) == most
    assert schedules.most_kept(made("gpipe", **sizes)) == microbatches
    if microbatches >= 2 * stages - 1:  # all slots are in use only where one is filled
        assert lowering.lower(made("1f1b", **sizes))[1].kept == most


@given(any_schedule())
def test_balanced_stages_keep_less_and_do_the_same(schedule):
    schedule = dataclasses.replace(schedule, away=())
    found = schedules.balanced(schedule)
    assert schedules.most_kept(found) <= schedules.most_kept(schedule)
    plain, slots = (lowering.lower(x)[1].kept for x in (schedule, found))
    assert slots < plain if found.is_balanced else slots == plain
    for kind in ("forward", "backward", "weight"):
        for one, other in zip(
            schedules.passes(found, kind), schedules.passes(schedule, kind), strict=True
        ):
            assert one == other


@given(STAGES, MICROBATCHES)
def test_balanced_1f1b_keeps_as_many_as_there_are_stages(stages, microbatches):
    sizes = {"stages": stages, "microbatches": microbatches}
    found = schedules.balanced(made("1f1b", **sizes))
    if stages == 2:  # the first has 3 for 2 ticks each, too short for there and back
        assert not found.is_balanced
        return
    assert schedules.most_kept(found) <= stages
    if microbatches >= 2 * stages - 1:
        assert found.is_balanced == (stages > 1)
        # The middle one of an odd number has no partner; others have one on its way.
        assert schedules.most_kept(found) == stages - (stages % 2 == 0)
        assert lowering.lower(found)[1].kept <= stages


def test_nothing_is_lent_where_it_would_save_nothing():
    for name in ("gpipe", "1f1b"):
        assert not schedules.balanced(made(name, stages=1)).is_balanced
    assert not schedules.balanced(made("gpipe")).is_balanced


@pytest.mark.parametrize(
    ("remat", "parallel", "expected"),
    [
        ("full", {}, True),
        ("dots", {}, False),
        ("dots", {"recompute": True}, True),
        ("none", {"balanced": "true"}, True),
        ("full", {"balanced": "false"}, False),
    ],
)
def test_stages_lend_where_they_keep_little_or_are_told_to(remat, parallel, expected):
    whole = config.Config(
        name="x",
        train=config.TrainConfig(remat=remat, microbatches=8),
        parallel=config.ParallelConfig(**parallel),
    )
    assert schedules.schedule_of(whole, 4).is_balanced is expected


def test_a_slow_network_within_the_pipeline_is_spared():
    whole = config.Config(
        name="x", train=config.TrainConfig(remat="full", microbatches=8)
    )
    for data, expected in ((2, True), (1, False)):
        mesh = config.MeshConfig(data=data, pipeline=4, slices=2)
        sliced = dataclasses.replace(whole, mesh=mesh)
        assert schedules.schedule_of(sliced, 4).is_balanced is expected


@given(STAGES, st.integers(1, 5), st.integers(1, 3))
def test_bubbles_are_those_of_the_papers(stages, groups, virtual):
    M, S, V = groups * stages, stages, virtual
    sizes = {"stages": S, "microbatches": M}
    plain = (S - 1) / (M + S - 1)
    for name in ("gpipe", "1f1b"):
        assert schedules.bubble(made(name, **sizes)) == pytest.approx(plain)
    # Forward and backward of a tick together, V times as many ticks, each 1/V as long.
    interleaved = made("interleaved", virtual=V, **sizes)
    assert schedules.bubble(interleaved) <= plain + 1e-9
    if V > 1 and S > 1:
        assert schedules.bubble(interleaved) < plain
    # Forward, backward and weight of one cost each: of 3 (S - 1) only 2 (S - 1) wait.
    assert schedules.bubble(made("zero_bubble", **sizes)) == pytest.approx(
        2 * (S - 1) / (3 * M + 2 * (S - 1))
    )


def test_forward_only_has_no_backward_pass_and_no_tick_for_it():
    schedule = schedules.forward_only(stages=3, virtual=2, microbatches=5)
    assert not schedules.has_backward(schedule)
    assert (schedule.forward[-1] >= 0).any()
    program, slots = lowering.lower(schedule)
    assert (program.back == schedules.NOTHING).all()
    assert (slots.dy, slots.left) == (1, 1)


def moved(table, entry, tick, stage):
    """The table with `entry` of `stage` at another tick."""
    table = table.copy()
    table[table[:, stage] == entry, stage] = schedules.NOTHING
    table[tick, stage] = entry
    return table


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda s: {"forward": moved(s.forward, 0, 0, 2)},
            "forward of microbatch 0 in chunk 2 (stage 2) is at tick 0, before its",
        ),
        (
            lambda s: {"backward": moved(s.backward, 5, 0, 1)},
            "backward of microbatch 5 in chunk 1 (stage 1) is at tick 0, before its",
        ),
        (
            lambda s: {"weight": moved(s.weight, 1, 2, 0)},
            "weight of microbatch 1 in chunk 0 (stage 0) is at tick 2, before its back",
        ),
        (
            lambda s: {"forward": np.where(s.forward == 3, -1, s.forward)},
            "forward of microbatch 3 in chunk 0 is never done",
        ),
        (
            lambda s: {"forward": np.where(s.forward == 3, 2, s.forward)},
            "forward of microbatch 2 in chunk 0 is done at ticks 2 and 3",
        ),
        (lambda s: {"microbatches": 5}, "there are 5"),
        (lambda s: {"away": (1, 1, 1)}, "of at most the first 2 of 4 stages"),
        (lambda s: {"away": (-1,)}, "away=(-1,) must be ticks"),
    ],
)
def test_a_table_that_cannot_be_is_refused(change, told):
    schedule = made("zero_bubble")
    with pytest.raises(ValueError, match=r"microbatch|away") as error:
        schedules.check(dataclasses.replace(schedule, **change(schedule)))
    assert told in str(error.value)


def test_two_arrivals_in_a_tick_are_refused():
    """Microbatch 1 enters where what went round the ring arrives."""
    schedule = made("interleaved", stages=1, virtual=2, microbatches=2)
    forward = np.array([[0], [2], [1], [3]], np.int32)
    backward = np.full((8, 1), schedules.NOTHING, np.int32)
    backward[4:, 0] = [1, 0, 3, 2]
    table = dataclasses.replace(
        schedule,
        forward=np.concatenate([forward, np.full_like(forward, schedules.NOTHING)]),
        backward=backward,
    )
    schedules.check(table)
    with pytest.raises(ValueError, match="stage 0 would get two inputs at tick 1"):
        lowering.lower(table)


def test_names_and_virtual_stages_are_checked():
    with pytest.raises(ValueError, match="use one of gpipe, 1f1b"):
        made("2f2b")
    with pytest.raises(ValueError, match="1f1b has one virtual stage, not 2"):
        made("1f1b", virtual=2)


def test_a_schedule_is_drawn_as_text():
    drawn = schedules.draw(made("1f1b", stages=2, microbatches=3))
    assert drawn == (
        "1f1b: 2 stages x 1 virtual, 3 microbatches, 5 ticks, bubble 25.0%, a stage "
        "keeps at most 3\n"
        "stage 0  forward   0 1 2 . .\n"
        "         backward  . . 0 1 2\n"
        "stage 1  forward   . 0 1 2 .\n"
        "         backward  . 0 1 2 ."
    )
    lettered = schedules.draw(made("interleaved", virtual=2, microbatches=4), ticks=3)
    assert "stage 0  forward   0a 1a 2a ... " in lettered
    lent = schedules.draw(schedules.balanced(made("1f1b", microbatches=8)), ticks=1)
    assert (
        lent.splitlines()[1] == "stage lends to stage, for ticks: 0 to 3: 3, 1 to 2: 1"
    )
