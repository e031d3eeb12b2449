"""Checkpoints to Orbax and safetensors and back: the same arrays, bit for bit."""

import json

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from jaxinfra.checkpoint import checking, integrity, lifecycle, look
from jaxinfra.config import ConfigError, DataError
from jaxinfra.interop import checkpoints

METADATA = {"config": {"train": {"steps": 40}}, "data": {"row": 12}}


def values():
    rng = np.random.default_rng(0)
    return {
        "params/embedding": rng.random((7, 5), np.float32),
        "params/layers/query": rng.random((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "opt/0/mu": rng.random((7, 5)).astype(np.float16),
        "opt/0/count": np.array(3, np.int32),
        "key": np.array([1, 2**32 - 1], np.uint32),
    }


@pytest.fixture
def step(tmp_path):
    saves = lifecycle.Checkpointer(
        tmp_path / "run" / "checkpoints", keep=9, run_id="r", attempt=1
    )
    arrays = {name: jax.device_put(x) for name, x in values().items()}
    saves.save(8, arrays, metadata=METADATA)
    saves.close()
    return tmp_path / "run" / "checkpoints" / "8"


def assert_is(step_folder, wanted):
    manifest = checking.load(step_folder)
    assert sorted(manifest.arrays) == sorted(wanted)
    for name, value in wanted.items():
        found = look.read_array(step_folder, manifest.arrays[name])
        assert (found.dtype, found.shape) == (value.dtype, value.shape), name
        assert found.tobytes() == value.tobytes(), name


def test_stock_orbax_restores_what_is_exported(step, tmp_path):
    assert checkpoints.export_orbax(step, tmp_path / "out") == 5
    restored = ocp.StandardCheckpointer().restore(tmp_path / "out")
    flat = {
        "/".join(key.key for key in keys): np.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(restored)
    }
    assert sorted(flat) == sorted(values())
    for name, value in values().items():
        assert flat[name].dtype == value.dtype
        assert flat[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("kind", ["standard", "pytree", "manager"])
def test_what_stock_orbax_wrote_is_imported(kind, tmp_path):
    wanted = values() | {"wide": np.arange(3), "list/0": np.ones(2, np.float32)}
    tree = checkpoints._nested({k: v for k, v in wanted.items() if k != "list/0"})
    tree["list"] = [wanted["list/0"]]
    tree = jax.tree.map(lambda x: x if x.dtype == np.int64 else jax.device_put(x), tree)
    source = tmp_path / "orbax"
    if kind == "manager":
        with ocp.CheckpointManager(source) as manager:
            manager.save(5, args=ocp.args.StandardSave(tree))
        source = source / "5"
    else:
        is_standard = kind == "standard"
        writer = ocp.StandardCheckpointer() if is_standard else ocp.PyTreeCheckpointer()
        writer.save(source, tree)
        if is_standard:
            writer.wait_until_finished()
    run = tmp_path / "run"
    assert checkpoints.import_checkpoint(source, run, step=5) == len(wanted)
    assert_is(run / "checkpoints" / "5", wanted)


@pytest.mark.parametrize("write", ["export_orbax", "export_safetensors"])
def test_there_and_back_is_the_same_step(write, step, tmp_path):
    getattr(checkpoints, write)(step, tmp_path / "out")
    run = tmp_path / "other"
    checkpoints.import_checkpoint(tmp_path / "out", run, step=8, like=step)
    assert look.diff_checkpoints(step, run / "checkpoints" / "8") == []


def test_safetensors_hold_the_step_and_its_config(step, tmp_path):
    checkpoints.export_safetensors(step, tmp_path / "out")
    file = tmp_path / "out" / checkpoints.SAFETENSORS
    found = safetensors.numpy.load_file(file)
    assert {name: x.tobytes() for name, x in found.items()} == {
        name: x.tobytes() for name, x in values().items()
    }
    with safetensors.safe_open(file, "np") as opened:
        about = opened.metadata()
    assert (about["step"], json.loads(about["config"])) == ("8", METADATA["config"])


def test_a_damaged_step_is_not_exported(step, tmp_path):
    chunk = step / "arrays/params/embedding/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[9] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(integrity.CheckpointError, match="params/embedding"):
        checkpoints.export_safetensors(step, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_neither_format_is_refused_with_what_to_give(step, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    take = lambda source, **more: checkpoints.import_checkpoint(
        source, tmp_path / "to", step=1, **more
    )
    with pytest.raises(ConfigError, match=r"neither safetensors .* nor an Orbax"):
        take(empty)
    with pytest.raises(ConfigError, match="is not there"):
        take(tmp_path / "gone")
    (empty / "_METADATA").write_text('{"tree_metadata": {}}')
    with pytest.raises(DataError, match="no checkpoint that Orbax reads"):
        take(empty)
    bad = tmp_path / "x.safetensors"
    bad.write_bytes(b"\xff" * 40)
    with pytest.raises(DataError, match="cannot be read"):
        take(bad)
    assert not (tmp_path / "to").exists()


def test_like_another_model_is_refused_by_the_array_that_differs(step, tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"params/embedding": np.ones((7, 6))}, file)
    with pytest.raises(ConfigError, match=r"array 'key' is None .* give --like"):
        checkpoints.import_checkpoint(file, tmp_path / "to", step=1, like=step)
