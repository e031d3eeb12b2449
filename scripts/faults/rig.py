"""What the trials stand on: forked children, a small run, and what a run left on disk.

The run has 47,000 parameters in 9 arrays with their moments: a step takes
milliseconds, a save some 40 files. Its quiet reference is made once for each version
of the sources and kept beside the ledger.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = pathlib.Path(__file__).resolve().parents[1]

STEPS = 1600  # of the quiet run
SAVE_EVERY = 40
SMALL = {
    "model.width": 32,
    "model.ffn_width": 96,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.repeats": 2,
    "train.length": 32,
    "train.batch_size": 8,
    "train.save_every": SAVE_EVERY,
    "train.log_batch_digest": "true",
    "optimizer.schedule": "constant",
    "eval.batches": 1,
    "eval.every": 0,
    "checkpoint.keep": 1000,
    "run.log_every": 100_000,
    "sample.tokens": 0,
}
TIMEOUT_SECS = 300.0  # a trial of seconds, on a machine with other work: then it hangs


@dataclasses.dataclass
class Outcome:
    """What a trial found: `count` checks, of which those in `failures` failed."""

    count: int = 1
    failures: list[str] = dataclasses.field(default_factory=list)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, rule: Any, text: str) -> None:
        if not rule:
            self.failures.append(text[:900])


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a forked child ended: an exit code, or a signal's negative number; `value` is
    what its action returned, `text` what it printed."""

    code: int
    value: Any
    text: str
    secs: float


class Child:
    """A forked process that runs `action`, and tells what it returns as JSON."""

    def __init__(self, action: Callable[[], Any]):
        self._text = tempfile.TemporaryFile()  # noqa: SIM115 - read when it has ended
        reading, writing = os.pipe()
        self._began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _become(action, writing, self._text.fileno())
        os.close(writing)
        self._pipe, self._told = reading, b""

    def is_running(self) -> bool:
        return (
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        )

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_secs: float = TIMEOUT_SECS) -> Ended:
        """Waits for its end; one that takes too long is killed and counts as a hang."""
        deadline = time.monotonic() + timeout_secs
        while True:
            ready, _, _ = select.select(
                [self._pipe], [], [], deadline - time.monotonic()
            )
            if not ready:
                os.kill(self.pid, signal.SIGKILL)
                break
            part = os.read(self._pipe, 1 << 16)
            if not part:
                break
            self._told += part
        is_hung = time.monotonic() > deadline
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pipe)
        self._text.seek(0)
        text = self._text.read().decode(errors="replace")
        self._text.close()
        return Ended(
            os.waitstatus_to_exitcode(status),
            json.loads(self._told) if self._told else None,
            f"hung for {timeout_secs} s\n{text}" if is_hung else text,
            time.monotonic() - self._began,
        )


def forked(action: Callable[[], Any], timeout_secs: float = TIMEOUT_SECS) -> Ended:
    """`action` in a child of its own, to its end."""
    return Child(action).wait(timeout_secs)


def _become(action: Callable[[], Any], writing: int, text: int) -> None:
    """The child: never returns to the code that forked it."""
    code = 1
    try:
        os.dup2(text, 1)
        os.dup2(text, 2)
        value = action()
        code = value if type(value) is int else 0
        with os.fdopen(writing, "w") as file:
            json.dump(value, file)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclasses.dataclass(frozen=True)
class Rig:
    """Where a worker's trials work: `home` is kept between workers of one version."""

    home: pathlib.Path
    work: pathlib.Path

    def random(self, row: str, number: int) -> random.Random:
        """The chance of one trial: the same when it is run again."""
        return random.Random(f"{row}/{number}")

    @contextlib.contextmanager
    def folder(self) -> Iterator[pathlib.Path]:
        """An empty folder, gone after the block."""
        made = pathlib.Path(tempfile.mkdtemp(dir=self.work))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def words(self, run_dir: pathlib.Path, **settings: Any) -> list[str]:
        """The command line of the small run in `run_dir`; `__` in a key is a dot."""
        named = {key.replace("__", "."): value for key, value in settings.items()}
        cache = {"run.dir": run_dir, "data.cache_dir": self.home / "cache"}
        return [f"--{key}={value}" for key, value in (SMALL | cache | named).items()]

    def start(self, run_dir: pathlib.Path, **settings: Any) -> Child:
        """The run of that command line, in the background."""
        return Child(lambda: train(self.words(run_dir, **settings)))

    def run(self, run_dir: pathlib.Path, **settings: Any) -> Ended:
        """The run of that command line, to its end."""
        return self.start(run_dir, **settings).wait()

    @property
    def quiet(self) -> pathlib.Path:
        """The folder of a run of `STEPS` steps, undisturbed, all its saves kept."""
        return self.made("quiet", lambda folder: self.run(folder, train__steps=STEPS))

    def made(
        self, name: str, make: Callable[[pathlib.Path], Ended | None]
    ) -> pathlib.Path:
        """A folder of that name, made once and whole."""
        final = self.home / name
        if not final.exists():
            aside = self.home / f".{name}.{os.getpid()}"
            ended = make(aside)
            if ended is not None and ended.code != 0:
                raise RuntimeError(f"{name} ended with {ended.code}: {ended.text}")
            os.replace(aside, final)
        return final

    def copy_as_of(self, step: int, target: pathlib.Path) -> pathlib.Path:
        """The quiet run's folder as a crash left it just after the save of `step`."""
        target.mkdir(parents=True)
        for name in ("config.json", "environment.json", "tokenizer.json"):
            shutil.copy(self.quiet / name, target)
        for name in ("metrics.jsonl", "events.jsonl"):
            lines = (self.quiet / name).read_text().splitlines(keepends=True)
            kept = [x for x in lines if json.loads(x).get("step", 0) <= step]
            (target / name).write_text("".join(kept))
        for saved in (step, step - SAVE_EVERY):
            here = f"checkpoints/{saved}"
            shutil.copytree(self.quiet / here, target / here)
        return target


def train(words: list[str]) -> int:
    """`scripts/train.py` with these words, in this process."""
    import train as script  # pyright: ignore[reportMissingImports]

    return script.main(words)


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines, but for a last one that was cut short."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def events(run_dir: pathlib.Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in lines(run_dir / "events.jsonl") if e["event"] == kind]


def history(run_dir: pathlib.Path) -> list[tuple]:
    """Of every step: its number, and what shows any other bit or any other batch."""
    keys = ("step", "train/loss", "train/grad_norm", "train/param_norm", "data/digest")
    return [tuple(x[key] for key in keys) for x in lines(run_dir / "metrics.jsonl")]


def saved_steps(run_dir: pathlib.Path) -> list[int]:
    folder = run_dir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def array_digests(step_folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file of every array of a step."""
    return {
        str(path.relative_to(step_folder)): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(step_folder.glob("arrays/**/*"))
        if path.is_file()
    }


def compare(out: Outcome, rig: Rig, run_dir: pathlib.Path) -> None:
    """Checks that a run which has ended is the quiet one, bit for bit."""
    found = history(run_dir)
    step = found[-1][0] if found else 0
    out.check(
        found == history(rig.quiet)[:step], "losses or batches are not the quiet's"
    )
    saved = saved_steps(run_dir)
    out.check(bool(saved) and saved[-1] == step, f"step {step} is not saved: {saved}")
    for number in saved[-1:]:
        here, there = (f / "checkpoints" / str(number) for f in (run_dir, rig.quiet))
        same = array_digests(here) == array_digests(there)
        out.check(same, f"arrays of step {number} are not the quiet run's")


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
