"""A part of a checkpoint: by name, in another dtype, reading nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.checkpoint import partial
from jaxinfra.checkpoint.commits import (
    CheckpointError,
    IncompatibleCheckpoint,
    NoUsableCheckpoint,
)


@pytest.fixture
def folder(state, checkpointer, tmp_path):
    for step in (1, 2):
        small_state.save_now(checkpointer, step, state)
    return tmp_path / "checkpoints"


@pytest.fixture
def place():
    return NamedSharding(small_state.make_mesh(data=2), P())


def test_parameters_alone_are_read_though_all_else_is_gone(folder, place):
    for gone in ("opt", "model_state"):
        for path in (folder / "2/arrays" / gone).rglob("c/**/*"):
            path.is_file() and path.unlink()
    found = partial.restore_part(folder, "params", sharding=place)
    assert found.step == 2
    values = small_state.make_values(0)
    assert set(found.arrays) == {"embedding", "pattern/0/attention/query"}
    for name, array in found.arrays.items():
        assert np.asarray(array).tobytes() == values[f"params/{name}"].tobytes()
        assert array.sharding == place


def test_a_subtree_comes_in_another_dtype_and_integers_as_they_are(folder, place):
    values = small_state.make_values(0)
    found = partial.restore_part(folder, "opt", sharding=place, dtype=jnp.float32)
    nu = found.arrays["nu"]
    assert (nu.dtype, found.arrays["count"].dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_array_equal(nu, values["opt/nu"].astype(np.float32))
    one = partial.restore_part(folder, "opt/count", sharding=lambda name, shape: place)
    assert int(one.arrays["opt/count"]) == int(values["opt/count"])


def test_damage_in_the_part_is_walked_back_from_and_in_a_stated_step_an_error(
    folder, place
):
    chunk = next(path for path in (folder / "2/arrays/opt/nu/c").iterdir())
    data = bytearray(chunk.read_bytes())
    data[1] ^= 4
    chunk.write_bytes(data)
    found = partial.restore_part(folder, "opt", sharding=place)
    assert (found.step, found.rejected[0][0]) == (1, 2)
    with pytest.raises(CheckpointError, match="opt/nu"):
        partial.restore_part(folder, "opt", step=2, sharding=place)
    assert partial.restore_part(folder, "params", sharding=place).step == 2
    (folder / "1/manifest.json").unlink()
    with pytest.raises(NoUsableCheckpoint, match=r"(?s)step 2: .*step 1: "):
        partial.restore_part(folder, "opt", sharding=place)


def test_a_name_or_a_step_that_is_not_there_is_told(folder, place):
    with pytest.raises(IncompatibleCheckpoint, match=r"no arrays 'param'.*params"):
        partial.restore_part(folder, "param", sharding=place)
    with pytest.raises(CheckpointError, match="no step 7"):
        partial.restore_part(folder, "params", step=7, sharding=place)


def test_one_array_is_placed_sharded(folder):
    mesh = small_state.make_mesh(fsdp=8)
    found = partial.restore_part(
        folder, "opt/nu", sharding=NamedSharding(mesh, P("fsdp"))
    )
    [array] = found.arrays.values()
    assert len(array.addressable_shards) == 8
    assert (
        jax.device_get(array).tobytes()
        == small_state.make_values(0)["opt/nu"].tobytes()
    )
