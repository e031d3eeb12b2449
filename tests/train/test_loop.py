"""The loop with a null step: who is called when, and what ends it."""

import types

import jax.numpy as jnp
import pytest

from jaxinfra.checkpoint.commits import SaveError
from jaxinfra.resilience import exitcodes
from jaxinfra.train import journal as journals
from jaxinfra.train import loop


class World:
    """Everything that the loop calls, writing down in what order."""

    def __init__(
        self,
        *,
        bad=(),
        stop_at=None,
        failed_polls=(),
        close_fails=False,
        extra=lambda step: {},
    ):
        self.extra = extra
        self.log = []
        self.records = []
        self.bad, self.stop_at = bad, stop_at
        self.failed_polls, self.close_fails = list(failed_polls), close_fails
        self.at = 0

    # journal
    def step(self, record):
        self.records.append(record)
        self.log.append(f"record {record['step']}")

    def say(self, text):
        self.said = text

    def event(self, kind, **fields):
        if kind != "compile":
            self.log.append(f"event {kind} {fields.get('step', '')}".rstrip())

    def sync(self):
        self.log.append("sync")

    # saver
    def save(self, step, state):
        assert state == step, "the state of that step"
        self.log.append(f"save {step}")

    def poll(self):
        if self.at in self.failed_polls:
            self.failed_polls.remove(self.at)
            raise SaveError("disk full")
        return []

    def wait(self):
        return self.poll()

    def close(self):
        self.log.append("close")
        if self.close_fails:
            raise SaveError("disk full")
        return []

    # hooks
    def evaluate(self, state):
        self.log.append(f"evaluate {state}")
        return {"eval/held_out/loss": 2.5}

    def stop_wanted(self):
        return "SIGTERM" if self.stop_at and self.at >= self.stop_at else None

    def train_step(self, state, batch):
        assert batch == f"batch {state}"
        self.at = state + 1
        self.log.append(f"step {self.at}")
        metrics = {
            "loss": jnp.float32(self.at),
            "tokens": jnp.float32(10),
            "is_finite": jnp.asarray(self.at not in self.bad),
        } | self.extra(self.at)
        return self.at, metrics


def run(world, *, steps=4, start=0, save_every=100, eval_every=0, max_bad_steps=2):
    batches = (
        types.SimpleNamespace(batch=f"batch {k}", wait_secs=0.0)
        for k in range(start, steps)
    )
    hooks = loop.Hooks(
        evaluate=world.evaluate,
        ballot=lambda wants: wants,
        stop_wanted=world.stop_wanted,
        profile=lambda step: None,
    )
    schedule = loop.Schedule(
        steps=steps,
        save_every=save_every,
        eval_every=eval_every,
        max_bad_steps=max_bad_steps,
        flops_of=lambda step: 1.0,
        peak_flops=None,
    )
    return loop.run(
        world.train_step,
        start,
        batches,
        start=start,
        schedule=schedule,
        hooks=hooks,
        saver=world,
        journal=world,
        lr=lambda step: 0.1 * step,
    )


def test_a_step_is_dispatched_before_the_one_before_is_read():
    world = World()
    assert run(world) == (4, exitcodes.DONE)
    assert world.log == [
        "step 1",
        "step 2",
        "record 1",
        "step 3",
        "record 2",
        "step 4",
        "record 3",
        "evaluate 4",
        "record 4",
        "save 4",
        "close",
    ]


def test_metrics_are_on_disk_before_the_save_of_their_step():
    world = World()
    run(world, steps=6, save_every=2)
    for s in (2, 4, 6):
        at = world.log.index(f"save {s}")
        assert {f"record {k}" for k in range(1, s + 1)} <= set(world.log[:at])
        assert f"step {s + 1}" not in world.log[:at]


def test_every_step_is_recorded_once_with_its_own_figures():
    world = World()
    run(world, steps=7, start=3, save_every=2, eval_every=3)
    assert [r["step"] for r in world.records] == [4, 5, 6, 7]
    assert [r["train/loss"] for r in world.records] == [4.0, 5.0, 6.0, 7.0]
    # The rate that made step s is that of s - 1 steps done.
    assert [r["train/lr"] for r in world.records] == pytest.approx([0.3, 0.4, 0.5, 0.6])
    assert ["eval/loss" in r for r in world.records] == [False, False, True, True]


def test_a_wish_to_stop_is_met_by_a_save_one_step_later():
    world = World(stop_at=2)
    state, code = run(world, steps=100)
    assert (state, code) == (3, exitcodes.PREEMPTED)
    assert world.log[-4:] == [
        "record 3",
        "save 3",
        "event preemption 3",
        "close",
    ]


def test_a_wish_to_stop_at_the_last_step_is_the_end():
    world = World(stop_at=4)
    assert run(world, steps=4) == (4, exitcodes.DONE)


def test_bad_steps_in_a_row_end_it_without_a_save():
    world = World(bad={3, 4, 5, 6})
    _, code = run(world, steps=100, max_bad_steps=2)
    assert code == exitcodes.DIVERGED
    assert not [line for line in world.log if line.startswith("save")]
    assert "event anomaly 3" in world.log


def test_overflows_while_the_loss_scale_falls_do_not_end_it():
    """They are told, and a step that is bad for another reason still counts."""
    scale, loss = [8.0, 4.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]
    extra = lambda k: {
        "loss_scale": jnp.float32(scale[k - 1]),
        "loss": jnp.float32(loss[k - 1]),
    }
    world = World(bad={1, 2, 3, 4}, extra=extra)
    assert run(world, steps=4, max_bad_steps=2) == (4, exitcodes.DONE)
    assert [r["train/loss_scale"] for r in world.records] == scale
    assert len([line for line in world.log if "anomaly" in line]) == 4
    loss[1:3] = [float("nan")] * 2
    world = World(bad={1, 2, 3, 4}, extra=extra)
    assert run(world, steps=4, max_bad_steps=2)[1] == exitcodes.DIVERGED


def test_single_bad_steps_do_not_end_it():
    world = World(bad={2, 4, 6})
    assert run(world, steps=8, max_bad_steps=2) == (8, exitcodes.DONE)
    assert [line for line in world.log if "anomaly" in line] == [
        f"event anomaly {k}" for k in (2, 4, 6)
    ]


def test_a_failed_save_is_told_and_the_run_goes_on():
    world = World(failed_polls=[3])
    assert run(world, steps=4) == (4, exitcodes.DONE)
    assert "event save_failed" in world.log


def test_a_last_save_that_failed_has_its_code():
    world = World(close_fails=True)
    assert run(world)[1] == exitcodes.SAVE_FAILED


def test_nothing_left_to_do_is_done():
    world = World()
    assert run(world, steps=4, start=4) == (4, exitcodes.DONE)
    assert world.log == ["close"]


def test_a_step_that_waits_for_its_data_says_so():
    record = {"train/loss": 1.0, "perf/step_secs": 0.5, "perf/tokens_per_sec": 9.0}
    shown = [
        journals._figures(record | {"data/wait_secs": secs}, "token")
        for secs in (0.0, 0.02, 0.2)
    ]
    assert ["waits for data" in text for text in shown] == [False, False, True]
    assert shown[2].endswith("waits for data 40%")
    first = journals._figures({"train/loss": 1.0, "data/wait_secs": 9.0}, "token")
    assert first == "loss 1.0000"  # its time is that of compiling
