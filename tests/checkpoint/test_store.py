"""Arrays come back bit for bit, on any mesh, and never from a wrong chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_state
import tensorstore
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.checkpoint import restore, snapshot
from jaxinfra.checkpoint.commits import CheckpointError, IncompatibleCheckpoint

MESHES = {
    "as saved": ({"fsdp": 4, "tensor": 2}, 264, ("fsdp", "tensor"), None),
    "one device": ({}, 257, None, None),
    "fsdp 8": ({"fsdp": 8}, 264, "fsdp", None),
    "tensor on the last dim": (
        {"data": 2, "fsdp": 2, "tensor": 2},
        258,
        "fsdp",
        "tensor",
    ),
    "replicated": ({"data": 8}, 257, None, None),
    "whole shards of padding": ({"fsdp": 8}, 512, "fsdp", None),
}


@pytest.mark.parametrize("case", MESHES)
def test_a_checkpoint_restores_bitwise_on_another_mesh(
    case, state, checkpointer, tmp_path
):
    small_state.save_now(checkpointer, 10, state)
    sizes, rows, split, other = MESHES[case]
    values = small_state.make_values(1)
    target = small_state.place(
        values,
        small_state.make_mesh(**sizes),
        padded_rows=rows,
        split=split,
        other=other,
    )
    found = restore.restore_latest(
        tmp_path / "checkpoints",
        small_state.abstract_of(target),
        logical_shapes=small_state.LOGICAL,
    )
    assert found.step == 10
    assert found.metadata["data"] == {"row": 12}
    small_state.assert_same_bits(found.arrays, small_state.make_values(0))
    for name, array in target.items():
        assert found.arrays[name].sharding == array.sharding


def test_shards_that_lie_wholly_in_the_padding_are_not_written(checkpointer, tmp_path):
    values = small_state.make_values(0)
    mesh = small_state.make_mesh(fsdp=8)
    wide = small_state.place(values, mesh, padded_rows=512, split="fsdp", other=None)
    small_state.save_now(checkpointer, 1, wide)
    chunks = tmp_path / "checkpoints/1/arrays/params/embedding/c"
    assert sorted(path.name for path in chunks.iterdir()) == ["0", "1", "2", "3", "4"]
    target = small_state.place(
        values, small_state.make_mesh(), padded_rows=257, split=None, other=None
    )
    found = restore.restore_latest(
        tmp_path / "checkpoints",
        small_state.abstract_of(target),
        logical_shapes=small_state.LOGICAL,
    )
    small_state.assert_same_bits(found.arrays, values)


def test_tensorstore_reads_the_same_values_from_the_files(
    state, checkpointer, tmp_path
):
    small_state.save_now(checkpointer, 10, state)
    for name, value in small_state.make_values(0).items():
        path = tmp_path / "checkpoints/10/arrays" / name
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        found = tensorstore.open(spec).result().read().result()
        assert found.tobytes() == value.tobytes()


def test_restored_arrays_may_be_donated_though_devices_share_their_memory(
    checkpointer, tmp_path
):
    everywhere = NamedSharding(small_state.make_mesh(data=8), P())
    values = np.arange(1 << 16, dtype=np.float32)  # Large enough not to be copied.
    small_state.save_now(checkpointer, 1, {"x": jax.device_put(values, everywhere)})
    abstract = {
        "x": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=everywhere)
    }
    x = restore.restore(tmp_path / "checkpoints", 1, abstract).arrays["x"]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    for _ in range(3):
        x = add(x)
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, values + 3)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "says"),
    [
        ("opt/nu", (32,), "float16", "float16(16,), the model wants float16(32,)"),
        ("opt/nu", (16,), "float32", "the model wants float32"),
        ("opt/xi", (16,), "float32", "no array 'opt/xi'"),
    ],
)
def test_another_models_checkpoint_is_refused_not_walked_back_from(
    name, shape, dtype, says, state, checkpointer, tmp_path
):
    small_state.save_now(checkpointer, 10, state)
    target = NamedSharding(small_state.make_mesh(), P())
    abstract = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=target)}
    with pytest.raises(IncompatibleCheckpoint) as error:
        restore.restore_latest(tmp_path / "checkpoints", abstract)
    assert says in str(error.value)


def test_what_cannot_be_saved_is_refused_at_once(checkpointer):
    with pytest.raises(CheckpointError, match="dtype 'key"):
        small_state.save_now(checkpointer, 1, {"key": jax.random.key(0)})
    with pytest.raises(CheckpointError, match="not plain"):
        small_state.save_now(checkpointer, 1, {"../x": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match="inside"):
        small_state.save_now(checkpointer, 1, {"x": jnp.zeros(3), "x/c": jnp.zeros(3)})
    with pytest.raises(ValueError, match="lie within"):
        checkpointer.save(
            1,
            {"x": jnp.zeros(3)},
            metadata=small_state.METADATA,
            logical_shapes={"x": (4,)},
        )


@pytest.mark.parametrize(
    ("shape", "shard", "limit", "wanted"),
    [
        ((), (), 64, ()),
        ((0, 4), (0, 4), 64, (1, 4)),
        ((24, 4), (12, 4), 1024, (12, 4)),
        ((24, 4), (12, 4), 64, (4, 4)),  # Divisors of a split dim,
        ((12, 4), (12, 4), 80, (5, 4)),  # any part of a whole one.
        ((6, 1024), (3, 1024), 64, (1, 16)),
        ((2 * 1009, 4), (1009, 4), 4096, (1009, 1)),  # A prime: the next dim is cut.
    ],
)
def test_chunks_divide_shards_and_stay_small(shape, shard, limit, wanted):
    assert snapshot.chunk_shape(shape, shard, itemsize=4, chunk_bytes=limit) == wanted


def test_small_chunks_restore_as_large_ones(state, checkpointer, tmp_path, monkeypatch):
    take = snapshot.take
    monkeypatch.setattr(
        snapshot, "take", lambda *args, **kwargs: take(*args, chunk_bytes=32, **kwargs)
    )
    small_state.save_now(checkpointer, 10, state)
    found = restore.restore_latest(
        tmp_path / "checkpoints",
        small_state.abstract_of(state),
        logical_shapes=small_state.LOGICAL,
    )
    small_state.assert_same_bits(found.arrays, small_state.make_values(0))
