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

import contextlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jaxinfra
from jaxinfra.config import Config, ConfigError, without_secrets

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.json"
COMPRESSED = "compressed"  # of a step's metadata: how its parameters are kept
_PACKAGES = ("jaxinfra", "jax", "jaxlib", "optax", "numpy", "tensorstore")


def folder(config: Config) -> Any:
    """Where the run of `config` lives: a path, or an `ObjectPath` that acts as one."""
    return _place(config.run.dir or f"runs/{config.name}")


def run_and_step(path: str | pathlib.Path) -> tuple[Any, int | None]:
    """RUN and STEP of RUN@STEP; a path that is there is never cut at an @."""
    place = _place(str(path))
    run, at, step = str(place).rpartition("@")
    if at and not place.exists() and step.isdecimal():
        return _place(run), int(step)
    return place, None


def _place(path: str) -> Any:
    # By its public name, which loads it: a run on disk needs none of it.
    is_url = "://" in path
    return jaxinfra.ObjectPath(path) if is_url else pathlib.Path(path).expanduser()


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
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is no JSON ({error}); put it back") from error
        jaxinfra.refuse_changes(tree, config, where=str(path))


def has_checkpoint(config: Config) -> bool:
    """Whether the run has saved a step, good or not."""
    steps = folder(config) / CHECKPOINTS
    return steps.is_dir() and any(path.name.isdecimal() for path in steps.iterdir())


def write_json(path: Any, value: Any) -> None:
    """Replaces a JSON file at once: it is old or new, never half."""
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    if not isinstance(path, pathlib.Path):
        path.write_bytes(text.encode())
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w") as file:
        file.write(text)
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
        "arguments": [without_secrets(word) for word in sys.argv[1:]],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "devices": devices,
    }


def json_lines(path: Any) -> "JsonLines":
    """A file of JSON lines to append to; parts of one in an object store."""
    return (
        JsonLines(path) if isinstance(path, pathlib.Path) else jaxinfra.JsonParts(path)
    )


class JsonLines:
    """A file of one JSON object a line, appended to; durable after `sync`, which may
    be called in another thread. What a full disk does not take waits for the next try.
    """

    def __init__(self, path: pathlib.Path):
        _cut_torn_line(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - of the whole run
        self._waiting, self._is_dirty = b"", False
        self._lock = threading.Lock()

    def write(self, record: Mapping[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):  # `sync` raises it
            self._waiting += json.dumps(record).encode() + b"\n"
            self._flush()

    def event(self, kind: str, **fields: Any) -> None:
        """A record of what happens now."""
        self.write({"time": time.time(), "event": kind, **fields})

    def sync(self) -> None:
        with self._lock:
            self._flush()
            is_dirty, self._is_dirty = self._is_dirty, False
        try:
            if is_dirty:
                os.fsync(self._file.fileno())
        except OSError:
            self._is_dirty = True
            raise

    def close(self) -> None:
        with contextlib.closing(self._file):
            self.sync()

    def _flush(self) -> None:
        while self._waiting:
            self._is_dirty = True
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def _cut_torn_line(path: pathlib.Path) -> None:
    """Removes a last line that a crash cut short, so that the next is not glued on."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + len(whole[1]))


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
