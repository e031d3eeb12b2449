"""A run that goes on: what may have changed since it began, and steps that are undone.

Loaded, by its public names, where a run folder holds something. Imports no jax: a
changed config is refused before jax loads.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from jaxinfra import options, runfolder
from jaxinfra.config import FOR_TRAINING, RESUMABLE, Config, ConfigError

Change = tuple[str, Any, Any]  # dotted key, old and new JSON value; None where absent


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
    changes = not_resumable(diff(old, config))
    if changes:
        lines = "".join(f"\n  {key}: {was!r} -> {now!r}" for key, was, now in changes)
        raise ConfigError(
            f"the run was started with other settings, says {where}:{lines}\nset them "
            "back, choose another --run.dir, or go on by --run.accept_changes true"
        )


def diff(old: Config, new: Config) -> list[Change]:
    """The settings that differ, by dotted key; of URLs what is not secret."""
    before, after = (dict(options.flatten(options.recorded(x), "")) for x in (old, new))
    return [
        (key, before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def not_resumable(changes: list[Change]) -> list[Change]:
    """Those changes that a resumed run may not make without run.accept_changes."""
    return [change for change in changes if not options.is_in(change[0], RESUMABLE)]


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
    path = runfolder.folder(config) / "config.json"
    return (
        options.from_json(json.loads(path.read_text()), fill=True)
        if path.is_file()
        else None
    )


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
    if lost:
        with open(run_dir / "metrics.lost.jsonl", "a") as file:
            file.writelines(lost)
            file.flush()
            os.fsync(file.fileno())
    # Always a new file: a run that was taken over goes on writing to the old one.
    aside = run_dir / ".metrics.jsonl.tmp"
    with open(aside, "w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return len(lost)
