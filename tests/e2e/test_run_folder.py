"""What stands in a run folder afterwards."""

import dataclasses

import jax.numpy as jnp
from e2e import command
from e2e.command import SAVE_EVERY, SMALL, STEPS

from jaxinfra import options
from jaxinfra.train import journal as journals

EVERY_STEP = {
    "step": int,
    "train/loss": float,
    "train/grad_norm": float,
    "train/param_norm": float,
    "train/lr": float,
    "train/tokens": float,
    "data/digest": int,
    "data/padding_frac": float,
    "data/wait_secs": float,
}
# The first step compiles; its time is that of the compile event.
AFTER_THE_FIRST = {
    "perf/step_secs": float,
    "perf/tokens_per_sec": float,
    "perf/mfu": float,
}
EVALUATED = {"eval/held_out/loss": float, "eval/loss": float}


def test_config_json_is_the_config_with_the_vocabulary(quiet, cache):
    found = options.from_json(command.strict_json((quiet / "config.json").read_text()))
    asked, _ = options.read_command(command.arguments(cache | {"run.dir": quiet}))
    model = dataclasses.replace(asked.model, vocab_size=found.model.vocab_size)
    assert found == dataclasses.replace(asked, model=model)
    assert found.model.vocab_size > 255


def test_environment_json_tells_what_it_ran_on(quiet):
    found = command.strict_json((quiet / "environment.json").read_text())
    assert found["devices"] == ["cpu cpu"]
    assert {"jax", "jaxlib", "numpy", "jaxinfra"} <= set(found["versions"])
    assert f"--run.dir={quiet}" in found["arguments"]
    assert {"python", "machine", "commit", "xla_flags"} <= set(found)


def test_metrics_have_every_key_of_the_contract_at_every_step(quiet):
    lines = command.metrics(quiet)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        wanted = EVERY_STEP | (AFTER_THE_FIRST if line["step"] > 1 else {})
        wanted |= EVALUATED if line["step"] % SMALL["eval.every"] == 0 else {}
        assert {key: type(line.get(key)) for key in wanted} == wanted, line["step"]
        assert ("eval/loss" in line) == (line["step"] % SMALL["eval.every"] == 0)
        assert line["train/tokens"] <= SMALL["train.batch_size"] * SMALL["train.length"]
        assert 0 <= line["data/padding_frac"] <= 1
    assert lines[-1]["eval/loss"] == lines[-1]["eval/held_out/loss"]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


class _Records:
    """A journal that keeps the records of steps."""

    def __init__(self):
        self.steps = []

    def step(self, record):
        self.steps.append(record)


def test_steps_that_run_while_they_are_dispatched_share_their_time(monkeypatch):
    # Small steps on CPU do. The last step before a save then looked 40 times as fast
    # as the others, at 300% MFU.
    clock = [0.0]
    monkeypatch.setattr(journals.time, "perf_counter", lambda: clock[0])
    journal = _Records()
    reader = journals.Reader(
        journal,
        lr=lambda step: 0.0,
        max_bad_steps=1,
        flops_of=lambda step: 1.0,
        peak_flops=None,
    )
    values = {"tokens": jnp.float32(8), "is_finite": jnp.bool_(True)}
    for step in range(1, 6):
        clock[0] += 10.0  # the dispatch, and the step within it
        reader.push(step, values, False, 0.0)
    reader.settle()
    reader.flush({})
    secs = [record["perf/step_secs"] for record in journal.steps[1:]]
    assert len(secs) == 4
    assert min(secs) >= 5.0
    assert max(secs) <= 10.0


def test_events_tell_the_run_in_order(quiet):
    found = command.events(quiet)
    saves = [*range(SAVE_EVERY, STEPS + 1, SAVE_EVERY), STEPS]
    assert [event["event"] for event in found] == [
        "start", "compile", *["save"] * len(saves), "end",
    ]  # fmt: skip
    assert [event["step"] for event in found if event["event"] == "save"] == saves
    times = [event["time"] for event in found]
    assert times == sorted(times)
    start, end = found[0], found[-1]
    assert start["step"] == 0
    for name in ("params", "grads", "opt"):
        assert start[f"memory/{name}_bytes"] > 0
    assert (
        start["memory/opt_bytes"] > start["memory/params_bytes"]
    )  # muon: 1 or 2 moments
    assert (end["step"], end["code"]) == (STEPS, 0)


def test_nothing_but_what_the_contract_names_is_left(quiet):
    names = {path.name for path in quiet.iterdir()}
    assert names == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "checkpoints",
        "owner.1.json",
        "tokenizer.json",
    }
    assert {path.name for path in (quiet / "checkpoints").iterdir()} == {
        str(step) for step in command.saved_steps(quiet)
    }
