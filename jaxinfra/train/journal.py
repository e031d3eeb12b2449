"""What a run tells: to disk (metrics.jsonl, events.jsonl) and to the person
watching."""

import contextlib
import math
import pathlib
from typing import Any

import jax

from jaxinfra import runfolder
from jaxinfra.config import Config
from jaxinfra.options import to_json
from jaxinfra.train.progress import Progress


class Journal:
    """The run folder's records and the progress shown; a context manager.

    In a job of several processes the first one writes and shows; the others nothing.
    """

    def __init__(self, run_dir: pathlib.Path, *, is_first: bool):
        self._run_dir, self._is_first = run_dir, is_first
        self._stack = contextlib.ExitStack()
        self._metrics = self._events = None
        self._progress: Progress | None = None

    def __enter__(self) -> "Journal":
        if self._is_first:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._events = runfolder.JsonLines(self._run_dir / "events.jsonl")
            self._stack.callback(self._events.close)
        return self

    def __exit__(self, *unused: Any) -> None:
        self._stack.close()

    def start(self, config: Config, *, start: int, facts: dict[str, Any]) -> None:
        """Writes config.json and environment.json, takes back metrics of steps that
        were undone, tells the start, and begins to show steps."""
        if self._is_first:
            runfolder.write_json(self._run_dir / "config.json", to_json(config))
            devices = [f"{d.platform} {d.device_kind}" for d in jax.devices()]
            environment = runfolder.environment(devices)
            runfolder.write_json(self._run_dir / "environment.json", environment)
            lost = runfolder.rewind_metrics(self._run_dir, start)
            self._metrics = runfolder.JsonLines(self._run_dir / "metrics.jsonl")
            self._stack.callback(self._metrics.close)
            self.event("start", step=start, undone_steps=lost, **facts)
        shown = Progress(
            start=start,
            steps=config.train.steps,
            every=config.run.log_every,
            is_shown=self._is_first,
        )
        self._progress = self._stack.enter_context(shown)

    def step(self, record: dict[str, Any]) -> None:
        """A step's record; figures that are not finite are written as null."""
        assert self._progress is not None, "start comes first"
        self._progress.step(record)
        if self._metrics:
            self._metrics.write({k: _plain(v) for k, v in record.items()})

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened now, for events.jsonl."""
        if self._events:
            self._events.event(kind, **{k: _plain(v) for k, v in fields.items()})

    def say(self, text: str) -> None:
        """Text for the person watching."""
        if self._progress:
            self._progress.say(text)
        elif self._is_first:
            print(text)

    def sync(self) -> None:
        """All that was told is on disk when this returns."""
        for lines in (self._metrics, self._events):
            if lines:
                lines.sync()


def _plain(value: Any) -> Any:
    is_odd = isinstance(value, float) and not math.isfinite(value)
    return None if is_odd else value
