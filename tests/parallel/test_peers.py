"""Who falls silent is named; who takes leave, or is slow, is not, and is waited for."""

import threading
import time
from typing import Any, NamedTuple

import numpy as np

from jaxinfra.resilience import peers

QUICK = {"limit_secs": 0.4, "every_secs": 0.02}


class Store:
    """The coordination service's key-value store, in this process."""

    def __init__(self):
        self.values, self.is_dead = {}, False

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, topic):
        if self.is_dead:
            raise RuntimeError("UNAVAILABLE")
        return [(k, v) for k, v in self.values.items() if k.startswith(topic)]


def test_a_peer_that_fell_silent_is_named():
    store, lost, told = Store(), [], threading.Event()
    store.values["jaxinfra/alive/1"] = "7"

    def tell(reason):
        lost.append(reason)
        told.set()

    with peers.watched(store, 0, lost=tell, **QUICK):
        assert told.wait(5)
    assert lost[0].startswith("process 1 is silent for ")


def test_peers_that_count_or_take_leave_are_not():
    store, lost = Store(), []
    with (
        peers.watched(store, 0, lost=lost.append, **QUICK),
        peers.watched(store, 1, lost=lost.append, **QUICK),
    ):
        store.values["jaxinfra/alive/2"] = "left"
        time.sleep(1.0)
    assert lost == []
    assert store.values["jaxinfra/alive/0"] == "left"


def test_a_store_that_does_not_answer_is_the_first_process_lost():
    store, told = Store(), threading.Event()
    store.is_dead = True
    with peers.watched(store, 1, lost=lambda reason: told.set(), **QUICK):
        assert told.wait(5)


class Steps(NamedTuple):
    train_step: Any
    eval_step: Any


class Jitted:
    """Of jax's jitted functions, what is used: notes what is asked of it."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def lower(self, *args):
        self.notes.append(f"lower {self.name} {args}")
        return self

    def compile(self):
        self.notes.append(f"compile {self.name}")

    def __call__(self, *args):
        self.notes.append(f"run {self.name} {args}")
        return args


class Barriers:
    def __init__(self, notes):
        self.notes = notes

    def wait_at_barrier(self, topic, timeout_in_ms):
        assert timeout_in_ms >= 600_000, "compiling may take minutes"
        self.notes.append(f"wait {topic.removeprefix('jaxinfra/compiled/')}")


def test_a_step_waits_for_all_once_between_compiling_and_running():
    notes = []
    steps = Steps(Jitted("train", notes), Jitted("eval", notes))
    met = peers.compiled_by_all(steps, Barriers(notes))
    assert notes == []
    assert met.train_step(1) == (1,)
    assert met.train_step(2) == (2,)
    assert met.eval_step(3, 4) == (3, 4)
    assert notes == [
        "lower train (1,)",
        "compile train",
        "wait train_step/0",
        "run train (1,)",
        "run train (2,)",
        "lower eval (3, 4)",
        "compile eval",
        "wait eval_step/0",
        "run eval (3, 4)",
    ]


def test_a_batch_of_new_shapes_is_waited_for_as_the_first_was():
    notes = []
    met = peers.compiled_by_all(Steps(Jitted("", notes), None), Barriers(notes))
    for rows in (4, 4, 8, 4):
        met.train_step("state", {"ids": np.zeros((rows, 2))})
    assert [note for note in notes if "wait" in note] == [
        "wait train_step/0",
        "wait train_step/1",
    ]
