"""A part of a checkpoint, by its names alone: parameters without their optimizer, one
subtree, in another dtype, on any sharding. Nothing else is read.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.checkpoint import commits, integrity, reading, restore
from jaxinfra.checkpoint.commits import CheckpointError, IncompatibleCheckpoint
from jaxinfra.checkpoint.restore import Restored


def restore_part(
    folder: Any,
    part: str,
    *,
    step: int | None = None,
    sharding: jax.sharding.Sharding | Callable[[str, tuple[int, ...]], Any],
    dtype: Any = None,
) -> Restored:
    """The arrays of `part` and below, such as "params" or "params/pattern/0", named
    without it; every byte that is read is checked.

    `folder`: a run's `checkpoints`, a path or URL. `step`: default: the newest that can
    be read. `sharding`: of all, or a function of an array's name and shape. `dtype`: of
    the arrays with floating point, rounded to nearest on the host; default: as saved.

    Raises:
      CheckpointError: the step is not there, or damaged; the text names the file.
      IncompatibleCheckpoint: the step has nothing of that name.
      NoUsableCheckpoint: there are steps and none is right.
    """
    steps = commits.step_folders(commits.place(folder))
    rejected: list[tuple[int, str]] = []
    for found, path in steps:
        if step is not None and found != step:
            continue
        try:
            read = _read(path, part, sharding, dtype)
        except IncompatibleCheckpoint:
            raise
        except CheckpointError as error:
            if step is not None:
                raise
            rejected.append((found, str(error)))
        else:
            manifest, arrays = read
            about = ("config", "data", "run_id", "attempt", "versions", "metrics")
            metadata = {name: getattr(manifest, name) for name in about}
            return Restored(
                step=found, arrays=arrays, metadata=metadata, rejected=tuple(rejected)
            )
    if step is not None or not rejected:
        raise CheckpointError(f"{folder} has no step {'' if step is None else step}")
    raise restore.none_usable(folder, rejected)


def _read(
    path: Any, part: str, sharding: Any, dtype: Any
) -> tuple[integrity.Manifest, dict[str, jax.Array]]:
    manifest = integrity.load(path)
    names = {
        name: name.removeprefix(part).lstrip("/") or name
        for name in manifest.arrays
        if name == part or name.startswith(f"{part}/") or not part
    }
    if not names:
        tops = sorted({name.partition("/")[0] for name in manifest.arrays})
        raise IncompatibleCheckpoint(
            f"step {manifest.step} has no arrays {part!r}; it has {', '.join(tops)}"
        )
    place = sharding if callable(sharding) else lambda name, shape: sharding
    abstract = {
        name: jax.ShapeDtypeStruct(
            stored.shape,
            _dtype(stored.dtype, dtype),
            sharding=place(names[name], stored.shape),
        )
        for name, stored in manifest.arrays.items()
        if name in names
    }
    found = reading.read_arrays(
        path, manifest, abstract, logical_shapes={}, is_cast=True
    )
    return manifest, {names[name]: array for name, array in found.items()}


def _dtype(stored: str, wanted: Any) -> Any:
    is_float = jnp.issubdtype(jnp.dtype(stored), jnp.floating)
    return jnp.dtype(wanted) if wanted is not None and is_float else jnp.dtype(stored)
