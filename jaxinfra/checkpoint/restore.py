"""Which step to go on from, and its arrays on any mesh: newest first, walking back.

A step that stands under its number was committed, so whatever is wrong with it is
damage. It is reported, passed over, and left on disk.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxinfra.checkpoint import commits, integrity, reading
from jaxinfra.checkpoint.commits import (
    CheckpointError,
    IncompatibleCheckpoint,
    NoUsableCheckpoint,
)
from jaxinfra.checkpoint.processes import GroupError, ProcessGroup

Shapes = Mapping[str, tuple[int, ...]]

_LOG = logging.getLogger(__name__)
# Counts the restores of this process: the same in all, it names their topics.
_TURN = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What was read, and the newer steps that were passed over, with the reason.

    `metadata` has `config` and `data` as given to `save`, and `manifest`'s `run_id`,
    `attempt` and `versions`.
    """

    step: int
    arrays: dict[str, jax.Array]
    metadata: dict[str, Any]
    rejected: tuple[tuple[int, str], ...] = ()


def latest(folder: Any) -> int | None:
    """The newest step whose manifest and file sizes are right; logs why others are not.

    Raises:
      NoUsableCheckpoint: there are steps and none is right.
    """
    rejected = []
    for step, path in commits.step_folders(commits.place(folder)):
        try:
            integrity.check_sizes(path, integrity.load(path))
        except IncompatibleCheckpoint:
            raise
        except CheckpointError as error:
            _LOG.warning("step %d is passed over: %s", step, error)
            rejected.append((step, str(error)))
        else:
            return step
    if rejected:
        raise none_usable(folder, rejected)
    return None


def newest_shapes(folder: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array of the newest step whose manifest is good; of none,
    nothing."""
    for _, path in commits.step_folders(commits.place(folder)):
        with contextlib.suppress(CheckpointError):
            return {n: a.shape for n, a in integrity.load(path).arrays.items()}
    return {}


def restore(
    folder: Any,
    step: int,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    logical_shapes: Shapes | None = None,
) -> Restored:
    """Reads one committed step onto the shardings of `abstract`, or part of it.

    Raises:
      CheckpointError: it is not there or damaged; the text names the file.
      IncompatibleCheckpoint: it holds other arrays than `abstract` asks for.
    """
    paths = [
        path
        for found, path in commits.step_folders(commits.place(folder))
        if found == step
    ]
    if not paths:
        raise CheckpointError(f"{folder} has no step {step}")
    return _read(paths[0], abstract, logical_shapes or {})


def restore_latest(
    folder: Any,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    logical_shapes: Shapes | None = None,
    staging_bytes: float = math.inf,
    process: ProcessGroup | None = None,
) -> Restored | None:
    """The newest step that every process can read whole; None where nothing was saved.

    Each process verifies what it reads; damage found by one makes all walk back.

    Raises:
      NoUsableCheckpoint: there are steps and none is right.
      IncompatibleCheckpoint: the newest holds other arrays than `abstract` asks for.
    """
    shapes = logical_shapes or {}
    group, topic = process or ProcessGroup(), f"jaxinfra/restore/{next(_TURN)}"
    names = group.from_first(
        f"{topic}/steps",
        lambda: [path.name for _, path in commits.step_folders(commits.place(folder))],
    )
    read = lambda path: _read(path, abstract, shapes, staging_bytes)
    rejected: list[tuple[int, str]] = []
    for name in names:
        path = commits.place(folder) / name
        try:
            restored = _read_together(group, f"{topic}/{name}", lambda p=path: read(p))
        except CheckpointError as error:
            if isinstance(error, IncompatibleCheckpoint):
                raise
            rejected.append((int(name.split(".")[0]), str(error)))
        else:
            return dataclasses.replace(restored, rejected=tuple(rejected))
    if rejected:
        raise none_usable(folder, rejected)
    return None


def _read_together(
    group: ProcessGroup, topic: str, read: Callable[[], Restored]
) -> Restored:
    """What this process read, once every process has read its part without damage."""
    here: list[Restored] = []
    group.contribute(topic, lambda: here.append(read()))
    try:
        group.from_first(f"{topic}/all", lambda: group.collect(topic))
    except GroupError as error:
        for kind in (IncompatibleCheckpoint, CheckpointError):
            if error.kind == kind.__name__:
                raise kind(str(error)) from error
        raise
    return here[0]


def _read(
    path: Any,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    logical_shapes: Shapes,
    staging_bytes: float = math.inf,
) -> Restored:
    manifest = integrity.load(path)
    integrity.check_sizes(path, manifest)
    arrays = reading.read_arrays(
        path,
        manifest,
        abstract,
        logical_shapes=logical_shapes,
        staging_bytes=staging_bytes,
    )
    about = ("config", "data", "run_id", "attempt", "versions")
    metadata = {name: getattr(manifest, name) for name in about}
    return Restored(step=manifest.step, arrays=arrays, metadata=metadata)


def none_usable(folder: Any, rejected: list[tuple[int, str]]) -> NoUsableCheckpoint:
    """The error of a run all of whose steps are damaged."""
    reasons = "".join(f"\n  step {step}: {reason}" for step, reason in rejected)
    return NoUsableCheckpoint(
        f"{folder} has checkpoints and none is usable, so nothing was started or "
        f"overwritten; put a good copy back, or begin in a new --run.dir:{reasons}"
    )
