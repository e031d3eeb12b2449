"""What a run tells while it runs: figures on their way from the device to disk
(metrics.jsonl, events.jsonl) and to the person watching.

Reading a step's scalars waits for the step. `Reader` reads them one step late, when
they are there already, and the device never waits for the host.
"""

import contextlib
import math
import pathlib
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import rich.console
import rich.progress

import jaxinfra
from jaxinfra import runfolder
from jaxinfra.config import Config
from jaxinfra.options import recorded
from jaxinfra.train import objective

_STARVED = 0.05  # of a step spent waiting for its batch, from which on it is shown


class Journal:
    """The run folder's records and the progress shown; a context manager.

    In a job of several processes the first one writes and shows; the others nothing.
    """

    def __init__(self, run_dir: Any, *, is_first: bool):
        self._run_dir, self._is_first = run_dir, is_first
        self._stack = contextlib.ExitStack()
        self._metrics = self._events = None
        self._progress: Progress | None = None
        self._at_start: dict[str, Any] = {}  # figures that go with the first step
        self._last: dict[str, Any] = {}

    def __enter__(self) -> "Journal":
        if self._is_first:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._events = runfolder.json_lines(self._run_dir / "events.jsonl")
            self._stack.callback(self._events.close)
        return self

    def __exit__(self, *unused: Any) -> None:
        self._stack.close()

    def start(
        self,
        config: Config,
        *,
        start: int,
        facts: dict[str, Any],
        unit: str = "token",
        files: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        """Writes config.json, environment.json and `files` (name -> JSON value), takes
        back metrics of steps that were undone, tells the start, and begins to show
        steps; `unit` is what the loss's weights count."""
        if self._is_first:
            runfolder.write_json(self._run_dir / "config.json", recorded(config))
            devices = [f"{d.platform} {d.device_kind}" for d in jax.devices()]
            environment = runfolder.environment(devices)
            runfolder.write_json(self._run_dir / "environment.json", environment)
            for name, value in files.items():
                runfolder.write_json(self._run_dir / name, value)
            metrics = self._run_dir / "metrics.jsonl"
            is_local = isinstance(metrics, pathlib.Path)
            rewind = jaxinfra.rewind_metrics if is_local else jaxinfra.rewind_parts
            lost = rewind(self._run_dir, start)
            self._metrics = runfolder.json_lines(metrics)
            self._stack.callback(self._metrics.close)
            self.event("start", step=start, undone_steps=lost, **facts)
        self._at_start = {k: v for k, v in facts.items() if k.startswith("memory/")}
        shown = Progress(
            start=start,
            steps=config.train.steps,
            every=config.run.log_every,
            unit=unit,
            is_shown=self._is_first,
        )
        self._progress = self._stack.enter_context(shown)

    def step(self, record: dict[str, Any]) -> None:
        """A step's record; figures that are not finite are written as null."""
        assert self._progress is not None, "start comes first"
        record, self._at_start = record | self._at_start, {}
        self._progress.step(record)
        self._last = record
        if self._metrics:
            self._metrics.write({k: _plain(v) for k, v in record.items()})

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened now, for events.jsonl."""
        if self._events:
            self._events.event(kind, **{k: _plain(v) for k, v in fields.items()})

    def damage(self, step: int, line: str) -> None:
        """Data of step `step` that is not what was written, and counts as padding."""
        self.event("quarantine", step=step, reason=line)
        self.say(line)

    def say(self, text: str) -> None:
        """Text for the person watching."""
        if self._progress:
            self._progress.say(text)
        elif self._is_first:
            print(text)

    def evaluated(self, step: int) -> dict[str, float]:
        """What `step` was evaluated to, if it is the last one recorded."""
        found = self._last if self._last.get("step") == step else {}
        is_plain = lambda k, v: k.startswith("eval/") and math.isfinite(v)
        return {k: v for k, v in found.items() if is_plain(k, v)}

    def sync(self) -> None:
        """All that was told is on disk when this returns; a save's thread calls it."""
        for lines in (self._metrics, self._events):
            if lines:
                lines.sync()


class Read(NamedTuple):
    """What the loop must know of a step that was read."""

    is_stop: bool = False
    has_diverged: bool = False

    def merged(self, later: "Read") -> "Read":
        """What either of two reads tells."""
        return Read(
            self.is_stop or later.is_stop, self.has_diverged or later.has_diverged
        )


class Reader:
    """Metrics on their way from the device to the journal, one step late."""

    def __init__(
        self,
        journal: Journal,
        *,
        lr: Callable[[int], float],
        max_bad_steps: int,
        flops_of: Callable[[int], float],
        peak_flops: float | None,
    ):
        self._journal, self._lr = journal, lr
        self._max_bad_steps = max_bad_steps
        self._flops_of, self._peak_flops = flops_of, peak_flops
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
        record |= _main_loss(extra)
        self._journal.step(record)
        if values["is_finite"]:
            self._bad_steps = 0
        elif objective.is_overflow(values):  # no sign of divergence: a scale too large
            reason = f"gradient too large for loss scale {values['loss_scale']:g}"
            self._journal.event("anomaly", step=step, reason=reason)
        else:
            self._bad_steps += 1
            reason = "loss or gradient not finite"
            self._journal.event("anomaly", step=step, reason=reason)
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
            path = name if "/" in name else f"train/{name}"
            record[names.get(name, path)] = value
        record["train/lr"] = self._lr(step - 1)
        record["data/wait_secs"] = wait_secs
        now, self._settled_secs = self._settled_secs or time.perf_counter(), None
        if self._clock is not None:
            secs = (now - self._clock) / num_ended
            now = self._clock + secs
            record["perf/step_secs"] = secs
            record["perf/tokens_per_sec"] = values["tokens"] / secs
            if self._peak_flops:
                rate = self._flops_of(step - 1) / secs
                record["perf/mfu"] = rate / self._peak_flops
        self._clock = now
        return record


class Progress:
    """Shows steps as they are recorded; a context manager."""

    def __init__(
        self, *, start: int, steps: int, every: int, unit: str, is_shown: bool = True
    ):
        self._unit = unit
        self._console = rich.console.Console(stderr=True, quiet=not is_shown)
        self._every = every
        self._steps = steps
        self._start = start
        self._start_secs = time.monotonic()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            rich.progress.BarColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, figures="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._bar.stop()

    def step(self, record: dict[str, Any]) -> None:
        """Shows a record of metrics.jsonl."""
        figures = _figures(record, self._unit)
        step = record["step"]
        self._bar.update(self._task, completed=step, figures=figures)
        has_eval = "eval/loss" in record
        is_due = step % self._every == 0 or step in (self._start + 1, self._steps)
        if not self._console.is_terminal and (is_due or has_eval):
            left = (time.monotonic() - self._start_secs) / (step - self._start)
            eta = _duration(left * (self._steps - step))
            self.say(f"step {step}/{self._steps}  {figures}  eta {eta}")
        if has_eval:
            self.say(_held_out(record))

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _main_loss(extra: dict[str, float]) -> dict[str, float]:
    """The loss on all that is held out of what is trained on."""
    if "eval/held_out/loss" in extra:
        return {"eval/loss": extra["eval/held_out/loss"]}
    names = {key.split("/")[1] for key in extra if key.startswith("eval/held_out_")}
    total = sum(extra[f"eval/{n}/loss"] * extra[f"eval/{n}/tokens"] for n in names)
    tokens = sum(extra[f"eval/{n}/tokens"] for n in names)
    return {"eval/loss": total / max(tokens, 1.0)} if names else {}


def _has_ended(metrics: Any) -> bool:
    leaves = jax.tree.leaves(metrics)
    return bool(leaves) and all(leaf.is_ready() for leaf in leaves)


def _plain(value: Any) -> Any:
    is_odd = isinstance(value, float) and not math.isfinite(value)
    return None if is_odd else value


def _figures(record: dict[str, Any], unit: str) -> str:
    parts = [f"loss {record['train/loss']:.4f}"]
    if "perf/tokens_per_sec" in record:
        parts.append(f"{record['perf/tokens_per_sec']:,.0f} {unit}s/s")
    if "perf/mfu" in record:
        parts.append(f"mfu {record['perf/mfu']:.1%}")
    starved = record["data/wait_secs"] / record.get("perf/step_secs", math.inf)
    if starved > _STARVED:
        parts.append(f"waits for data {starved:.0%}")
    return "  ".join(parts)


def _held_out(record: dict[str, Any]) -> str:
    """Of every set the loss, and bits a byte of text, or else its own metrics."""
    sets: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        parts = key.split("/")
        if parts[0] == "eval" and len(parts) == 3:
            sets.setdefault(parts[1], {})[parts[2]] = value
    return "; ".join(f"{name}: {_of_set(values)}" for name, values in sets.items())


def _of_set(values: dict[str, float]) -> str:
    if "bits_per_byte" in values:
        bits = values["bits_per_byte"]
        return f"{values['loss']:.4f} nats a token, {bits:.4f} bits a byte"
    told = (f"{what} {value:.4f}" for what, value in values.items() if what != "tokens")
    return ", ".join(told)


def _duration(secs: float) -> str:
    minutes, secs = divmod(int(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}"
