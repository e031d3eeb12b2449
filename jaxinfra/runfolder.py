"""The run folder: one place on disk that holds a run's whole history.

    config.json           the config of the last start
    tokenizer.json        of the text that the run learns, where it does
    environment.json      versions, commit, flags and devices of the last start
    metrics.jsonl         one object a step; every step stands once
    metrics.lost.jsonl    lines of steps that a crash undid
    events.jsonl          what happened when: start, compile, save, restore, end ...
    checkpoints/<step>/   see `jaxinfra.checkpoint`

Imports no jax: a changed config is refused before jax loads.
"""

import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from jaxinfra import options
from jaxinfra.config import FOR_TRAINING, Config, ConfigError

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.json"
COMPRESSED = "compressed"  # of a step's metadata: how its parameters are kept
_PACKAGES = ("jaxinfra", "jax", "jaxlib", "optax", "numpy", "tensorstore")


def folder(config: Config) -> pathlib.Path:
    """Where the run of `config` lives."""
    return pathlib.Path(config.run.dir or f"runs/{config.name}").expanduser()


def run_and_step(path: str | pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """RUN and STEP of RUN@STEP; a path that is there is never cut at an @."""
    place = pathlib.Path(path).expanduser()
    run, at, step = str(place).rpartition("@")
    if at and not place.exists() and step.isdecimal():
        return pathlib.Path(run), int(step)
    return place, None


def cache_dir(config: Config) -> pathlib.Path:
    """Where prepared text and compiled programs of all runs are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(config.data.cache_dir or pathlib.Path(home, "jaxinfra"))
    return folder.expanduser()


def check_resume(config: Config) -> None:
    """Refuses, by ConfigError, to go on with settings that would change the result."""
    path = folder(config) / "config.json"
    if path.is_file() and not config.run.accept_changes:
        try:
            tree = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON ({error}); put it back") from error
        refuse_changes(tree, config, where=str(path))


def refuse_changes(old_tree: Any, config: Config, *, where: str) -> None:
    """Raises ConfigError, with a diff, if `config` differs from the one that `where`
    holds as JSON in a key that a resumed run may not change."""
    try:
        old = options.from_json(old_tree, fill=True)
    except ConfigError as error:
        raise ConfigError(
            f"{where} is not a config of this version: {error}; choose another "
            "--run.dir, or go on with this one by --run.accept_changes true"
        ) from error
    config = as_begun(config, old)
    changes = options.not_resumable(options.diff(old, config))
    if changes:
        lines = "".join(f"\n  {key}: {was!r} -> {now!r}" for key, was, now in changes)
        raise ConfigError(
            f"the run was started with other settings, says {where}:{lines}\nset them "
            "back, choose another --run.dir, or go on by --run.accept_changes true"
        )


def as_begun(config: Config, old: Config) -> Config:
    """`config` with what the first start found out, as `old` tells: the tokenizer's
    vocabulary, and the model of init.from where init.model takes it."""
    ours = config.model
    model = old.model if config.init.model else ours
    stated = {name: getattr(ours, name) for name in FOR_TRAINING if config.init.model}
    vocab_size = ours.vocab_size or old.model.vocab_size
    model = dataclasses.replace(model, vocab_size=vocab_size, **stated)
    return dataclasses.replace(config, model=model)


def begun(config: Config) -> Config | None:
    """The config of the last start, None where there was none."""
    path = folder(config) / "config.json"
    return (
        options.from_json(json.loads(path.read_text()), fill=True)
        if path.is_file()
        else None
    )


def has_checkpoint(config: Config) -> bool:
    """Whether the run has saved a step, good or not."""
    steps = folder(config) / CHECKPOINTS
    return steps.is_dir() and any(path.name.isdecimal() for path in steps.iterdir())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file at once: it is old or new, never half."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w") as file:
        file.write(json.dumps(value, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def environment(devices: list[str]) -> dict[str, Any]:
    """What a reader needs to repeat the run; no environment variable but XLA's."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": _commit(),
        "arguments": sys.argv[1:],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "devices": devices,
    }


class JsonLines:
    """A file of one JSON object a line, appended to; durable after `sync`."""

    def __init__(self, path: pathlib.Path):
        _cut_torn_line(path)
        self._file = open(path, "a")  # noqa: SIM115 - lives as long as the run
        self._is_dirty = False

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._is_dirty = True

    def event(self, kind: str, **fields: Any) -> None:
        """A record of what happens now."""
        self.write({"time": time.time(), "event": kind, **fields})

    def sync(self) -> None:
        if self._is_dirty:
            os.fsync(self._file.fileno())
            self._is_dirty = False

    def close(self) -> None:
        self.sync()
        self._file.close()


def _cut_torn_line(path: pathlib.Path) -> None:
    """Removes a last line that a crash cut short, so that the next is not glued on."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + len(whole[1]))


def rewind_metrics(run_dir: pathlib.Path, step: int) -> int:
    """Moves lines of steps after `step` to metrics.lost.jsonl; returns how many.

    A last line that a crash cut short goes too. The lost lines are on disk before the
    kept ones replace the file, so a crash in between loses nothing.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    kept, lost = [], []
    for line in path.read_text().splitlines():
        try:
            is_kept = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            is_kept = False
        (kept if is_kept else lost).append(line + "\n")
    if not lost:
        return 0
    with open(run_dir / "metrics.lost.jsonl", "a") as file:
        file.writelines(lost)
        file.flush()
        os.fsync(file.fileno())
    aside = run_dir / ".metrics.jsonl.tmp"
    with open(aside, "w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return len(lost)


def _commit() -> str:
    """Commit of the checkout that this runs from; empty for an installed package."""
    root = pathlib.Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
