"""Checkpoints of other formats: Orbax's and safetensors, written and read whole.

Ours is a flat mapping from names such as `params/pattern/0/query` to arrays; Orbax's is
a tree, whose keys are the parts of the names; a safetensors file has the names as they
are. Every byte that is exported is checked against the manifest first. Nothing is
unpickled: both formats are JSON and numbers.

Limits: one process; the whole state passes through host memory. What Orbax or
safetensors hold beside arrays (strings, typed random keys, float8) is refused.
"""

import json
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from jaxinfra import runfolder
from jaxinfra.checkpoint import checking, commits, integrity, lifecycle, look
from jaxinfra.config import ConfigError, DataError
from jaxinfra.interop import export
from jaxinfra.resilience import ownership

_ORBAX = "_METADATA"  # A folder with it is an item of Orbax.
SAFETENSORS = "state.safetensors"


def export_orbax(step_folder: Any, target: pathlib.Path) -> int:
    """Writes a step as Orbax's StandardCheckpointer does; returns how many arrays.

    Raises ConfigError where `target` is there already, CheckpointError for damage,
    DataError if the disk refuses.
    """
    arrays = _read(step_folder)
    with export.made_folder(target) as made:
        checkpointer = ocp.StandardCheckpointer()
        # Orbax makes the folder of an item itself.
        checkpointer.save(made.absolute() / "state", _nested(arrays))
        checkpointer.wait_until_finished()
        checkpointer.close()
        for path in (made / "state").iterdir():
            path.rename(made / path.name)
        (made / "state").rmdir()
    return len(arrays)


def export_safetensors(step_folder: Any, target: pathlib.Path) -> int:
    """Writes a step as one safetensors file in a folder; step, config and data state
    stand in its metadata as JSON. Returns and raises as `export_orbax`."""
    manifest, arrays = checking.load(step_folder), _read(step_folder)
    about = {
        key: json.dumps(getattr(manifest, key), sort_keys=True)
        for key in ("step", "config", "data", "versions")
    }
    with export.made_folder(target) as made:
        safetensors.numpy.save_file(arrays, made / SAFETENSORS, metadata=about)
        with open(made / SAFETENSORS, "rb") as file:
            os.fsync(file.fileno())
    return len(arrays)


def import_checkpoint(
    source: pathlib.Path,
    run_dir: Any,
    *,
    step: int,
    like: Any = None,
) -> int:
    """Saves what Orbax or safetensors hold as a step of a run; returns how many arrays.

    `like`: the folder of a step whose config and data state the new one gets, so that
    a run goes on from it. Raises ConfigError for a `source` that is neither, or a step
    that is there; DataError for damage; FolderOwned where the run is going on.
    """
    arrays = _open(source)
    metadata: dict[str, Any] = {"config": {}, "data": {}}
    if like is not None:
        manifest = checking.load(like)
        metadata = {"config": manifest.config, "data": manifest.data}
        _refuse_others(arrays, manifest, source, like)
    steps = commits.place(str(run_dir / runfolder.CHECKPOINTS))
    if any(found == step for found, _ in commits.step_folders(steps)):
        raise ConfigError(f"{steps} has step {step} already; give another by --step")
    owner = ownership.acquire(run_dir)
    try:
        saves = lifecycle.Checkpointer(
            steps,
            keep=1 << 30,
            run_id=uuid.uuid4().hex,
            attempt=owner.attempt,
            fence=owner.check,
        )
        with jax.enable_x64(True):  # else int64 would become int32
            placed = {name: jax.device_put(array) for name, array in arrays.items()}
            saves.save(step, placed, metadata=metadata)
        saves.close()
    except commits.SaveError as error:
        raise DataError(f"{error}; free the disk or choose another --to") from error
    finally:
        owner.release()
    return len(arrays)


def _read(step_folder: Any) -> dict[str, np.ndarray]:
    arrays = checking.load(step_folder).arrays
    return {name: look.read_array(step_folder, array) for name, array in arrays.items()}


def _refuse_others(
    arrays: Mapping[str, np.ndarray],
    manifest: integrity.Manifest,
    source: pathlib.Path,
    like: Any,
) -> None:
    """Raises ConfigError where `like` has other arrays: no run could go on."""
    found = {name: (x.dtype.name, x.shape) for name, x in arrays.items()}
    wanted = {name: (x.dtype, x.shape) for name, x in manifest.arrays.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"array {name!r} is {found.get(name)} in {source} and "
                f"{wanted.get(name)} in {like}; give --like a run of the same model "
                "and optimizer, or leave it out"
            )


def _open(source: pathlib.Path) -> dict[str, np.ndarray]:
    """Name -> array of an Orbax item or of safetensors files."""
    if source.is_file() and source.suffix == ".safetensors":
        return _read_safetensors([source])
    if not source.is_dir():
        raise ConfigError(
            f"{source} is not there; give a folder, or a .safetensors file"
        )
    if files := sorted(source.glob("*.safetensors")):
        return _read_safetensors(files)
    if (source / _ORBAX).is_file():
        return _read_orbax(source)
    items = sorted(path.parent for path in source.glob(f"*/{_ORBAX}"))
    if len(items) == 1:  # a step of Orbax's CheckpointManager
        return _read_orbax(items[0])
    names = ", ".join(item.name for item in items)
    raise ConfigError(
        f"{source} has {f'the items {names}; give one of them' if items else _NEITHER}"
    )


_NEITHER = (
    "neither safetensors files nor an Orbax checkpoint (_METADATA); give the folder "
    "that has them"
)


def _read_orbax(item: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        checkpointer = ocp.PyTreeCheckpointer()
        described = checkpointer.metadata(item.absolute())
        tree = getattr(described, "item_metadata", described)
        tree = getattr(tree, "tree", tree)
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        restored = checkpointer.restore(
            item.absolute(), restore_args=jax.tree.map(lambda _: as_numpy, tree)
        )
    except Exception as error:  # Orbax raises what its parts raise
        raise DataError(
            f"{item} is no checkpoint that Orbax reads ({type(error).__name__}: "
            f"{error!s:.300}); write it again"
        ) from error
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(restored):
        name = "/".join(_part(key) for key in keys)
        array = np.asarray(leaf)
        if array.dtype.name not in integrity.ITEM_BYTES:
            raise DataError(
                f"{item}: {name} is {type(leaf).__name__} of {array.dtype}, not an "
                "array of numbers; leave it out of what is saved"
            )
        found[name] = array
    return found


def _read_safetensors(files: list[pathlib.Path]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in files:
        try:
            arrays = safetensors.numpy.load_file(file)
        # AttributeError: a dtype that numpy has not, as float8.
        except (safetensors.SafetensorError, AttributeError, OSError) as error:
            raise DataError(
                f"{file} cannot be read ({error}); write it again"
            ) from error
        if twice := found.keys() & arrays.keys():
            raise DataError(f"{file} has {min(twice)!r}, which another file has too")
        found |= arrays
    return found


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The tree whose paths are the names."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree


def _part(key: Any) -> str:
    """A step of a path in a tree, as a part of a name."""
    for kind in ("key", "idx", "name"):
        if hasattr(key, kind):
            return str(getattr(key, kind))
    return str(key)
