"""What a person sees of a run: a progress bar on a terminal, lines in a log file."""

import time
from typing import Any

import rich.console
import rich.progress


class Progress:
    """Shows steps as they are recorded; a context manager."""

    def __init__(self, *, start: int, steps: int, every: int, is_shown: bool = True):
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
        figures = _figures(record)
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


def _figures(record: dict[str, Any]) -> str:
    parts = [f"loss {record['train/loss']:.4f}"]
    if "perf/tokens_per_sec" in record:
        parts.append(f"{record['perf/tokens_per_sec']:,.0f} tokens/s")
    if "perf/mfu" in record:
        parts.append(f"mfu {record['perf/mfu']:.1%}")
    return "  ".join(parts)


def _held_out(record: dict[str, Any]) -> str:
    sets = [key.split("/")[1] for key in record if key.endswith("/bits_per_byte")]
    return "; ".join(
        f"{name}: {record[f'eval/{name}/loss']:.4f} nats a token, "
        f"{record[f'eval/{name}/bits_per_byte']:.4f} bits a byte"
        for name in sets
    )


def _duration(secs: float) -> str:
    minutes, secs = divmod(int(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}"
