"""The run folder: one place on disk that holds a run's whole history.

    config.json           the config of the last start
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
from jaxinfra.config import Config, ConfigError

CHECKPOINTS = "checkpoints"
_PACKAGES = ("jaxinfra", "jax", "jaxlib", "optax", "numpy", "tensorstore")


def folder(config: Config) -> pathlib.Path:
    """Where the run of `config` lives."""
    return pathlib.Path(config.run.dir or f"runs/{config.name}").expanduser()


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
    if not config.model.vocab_size:  # The tokenizer's, which the old config tells.
        model = dataclasses.replace(config.model, vocab_size=old.model.vocab_size)
        config = dataclasses.replace(config, model=model)
    changes = options.not_resumable(options.diff(old, config))
    if changes:
        lines = "".join(f"\n  {key}: {was!r} -> {now!r}" for key, was, now in changes)
        raise ConfigError(
            f"the run was started with other settings, says {where}:{lines}\nset them "
            "back, choose another --run.dir, or go on by --run.accept_changes true"
        )


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
