"""Runs of scripts/train.py as a user starts them: real processes, real signals.

A run that must be met at a step is frozen by SIGSTOP when its files say so; what was
seen then is what is on disk when it is killed.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train.py"

STEPS = 36
SAVE_EVERY = 5
# A model of 29,000 parameters. Its learning rate does not depend on train.steps, so
# that a run made longer keeps its losses.
SMALL = {
    "model.width": 32,
    "model.ffn_width": 64,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.repeats": 2,
    "train.length": 32,
    "train.batch_size": 8,
    "train.steps": STEPS,
    "train.save_every": SAVE_EVERY,
    "train.log_batch_digest": "true",
    "optimizer.schedule": "constant",
    "eval.batches": 2,
    "eval.every": 18,
    "checkpoint.keep": 20,
    "sample.tokens": 0,
}
TIMEOUT_SECS = 300.0  # of one run of seconds, on a machine with other work


def arguments(settings: dict[str, Any]) -> list[str]:
    """The command line of `SMALL` with `settings` over it."""
    return [f"--{key}={value}" for key, value in (SMALL | settings).items()]


def environment(**changed: str) -> dict[str, str]:
    """This process's, without what the tests set for jax in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"} | changed


def start(settings: dict[str, Any], **options: Any) -> subprocess.Popen:
    """A run in the background; its standard error goes to where it is told."""
    return subprocess.Popen(
        [sys.executable, SCRIPT, *arguments(settings)],
        env=environment(),
        cwd=ROOT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        **options,
    )


def train(settings: dict[str, Any], **options: Any) -> subprocess.CompletedProcess:
    """A run to its end."""
    return run(arguments(settings), **options)


def run(argv: list[str], **options: Any) -> subprocess.CompletedProcess:
    """scripts/train.py with these words, to its end."""
    return subprocess.run(
        [sys.executable, SCRIPT, *argv],
        env=environment(),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=TIMEOUT_SECS,
        **options,
    )


def freeze_when(
    process: subprocess.Popen, is_there: Callable[[], bool]
) -> subprocess.Popen:
    """Stops a run at a moment at which `is_there` holds, and still holds after that."""
    deadline = time.monotonic() + TIMEOUT_SECS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            text = process.stderr.read() if process.stderr else ""
            raise AssertionError(f"ended by {process.returncode} before that: {text}")
        if is_there():
            process.send_signal(signal.SIGSTOP)
            while _state(process.pid) not in "TZ":
                time.sleep(0.001)
            if is_there():
                return process
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    process.kill()
    raise AssertionError("the moment did not come")


def end(process: subprocess.Popen, number: int) -> tuple[int, str]:
    """Sends a signal to a frozen run and lets it go; its exit code and its words."""
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, text = process.communicate(timeout=TIMEOUT_SECS)
    return process.returncode, text


def strict_json(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(word: str):
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines; none where there is no file."""
    text = path.read_text() if path.exists() else ""
    assert not text or text.endswith("\n")
    return [strict_json(line) for line in text.splitlines()]


def metrics(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    return lines(run_dir / "metrics.jsonl")


def events(run_dir: pathlib.Path, kind: str = "") -> list[dict[str, Any]]:
    found = lines(run_dir / "events.jsonl")
    return [event for event in found if not kind or event["event"] == kind]


def steps_done(run_dir: pathlib.Path) -> int:
    """The last step of metrics.jsonl, 0 where none is; for a run that is writing."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved_steps(run_dir: pathlib.Path) -> list[int]:
    folder = run_dir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def writing(run_dir: pathlib.Path) -> list[pathlib.Path]:
    """Saves that have begun to write and are not committed."""
    return list(run_dir.glob("checkpoints/*.writing/arrays/*"))


def history(run_dir: pathlib.Path) -> list[tuple[int, float, float, int]]:
    """Of every step: its number, loss, gradient norm and the digest of its batch."""
    return [
        (line["step"], line["train/loss"], line["train/grad_norm"], line["data/digest"])
        for line in metrics(run_dir)
    ]


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def copy_as_of(step: int, source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A run's folder as a crash left it that took the saves after `step` with it."""
    shutil.copytree(source, target)
    for saved in saved_steps(target):
        if saved > step:
            shutil.rmtree(target / "checkpoints" / str(saved))
    return target


def damage(step_folder: pathlib.Path, array: str = "") -> pathlib.Path:
    """Flips one bit in the middle of a chunk of the array whose path ends so."""
    chunk = next(
        path
        for path in sorted(step_folder.glob(f"arrays/**/{array or '*'}/c/**/*"))
        if path.is_file()
    )
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    return chunk


def _state(pid: int) -> str:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0]
