"""What a run that has saved goes on from: its newest good step, if of this run."""

import dataclasses
import functools
from typing import Any

import jax

import jaxinfra
from jaxinfra import options
from jaxinfra.checkpoint import restore
from jaxinfra.checkpoint.commits import IncompatibleCheckpoint
from jaxinfra.checkpoint.processes import ProcessGroup
from jaxinfra.checkpoint.restore import Restored
from jaxinfra.config import ConfigError


def newest_state(
    folder: Any,
    abstract: dict[str, jax.ShapeDtypeStruct],
    shapes: dict[str, tuple[int, ...]],
    *,
    staging_bytes: float,
    group: ProcessGroup,
    config: dict[str, Any],
    stream: dict[str, Any],
    accept_changes: bool,
) -> Restored | None:
    """The arrays named in `abstract` of the newest good step; None where none is.

    Raises what `restore.restore_latest` raises, and ConfigError if `config` or the
    identity of the data `stream` is not that of the step. Where changes are accepted
    it is, and moments that were saved in other bits are converted.
    """
    read = functools.partial(
        restore.restore_latest, folder, staging_bytes=staging_bytes, process=group
    )
    try:
        found = read(abstract, logical_shapes=shapes)
    except IncompatibleCheckpoint:
        if not accept_changes:
            raise
        stored = restore.newest_shapes(folder)
        other, convert = jaxinfra.other_moments(abstract, stored)
        # Only what is converted may have the shape that it was saved in.
        of_other = {name: shapes.get(name, stored.get(name)) for name in other}
        found = read(other, logical_shapes=of_other)
        found = found and dataclasses.replace(found, arrays=convert(found.arrays))
    if found is not None and not accept_changes:
        _refuse_changes(found, folder, config, stream)
    return found


def _refuse_changes(
    found: Restored, folder: Any, config: dict[str, Any], stream: dict[str, Any]
) -> None:
    if not (folder.parent / "config.json").exists():
        jaxinfra.refuse_changes(
            found.metadata["config"],
            options.from_json(config),
            where=f"step {found.step} of {folder}",
        )
    seen = found.metadata["data"]
    if seen != stream:
        changed = [key for key in stream if seen.get(key) != stream[key]]
        raise ConfigError(
            f"the data stream is not the one of step {found.step}: {changed} changed; "
            "put the data back, choose another --run.dir, or go on by "
            "--run.accept_changes true"
        )
