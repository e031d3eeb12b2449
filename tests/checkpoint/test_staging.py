"""Host copies: bounded, deferred, shared by replicas, and with the bits of the call."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.checkpoint import commits, lifecycle, restore, snapshot, store
from jaxinfra.checkpoint.commits import SaveError

CHUNK = 1 << 16
KINDS = {
    "bounded": {"staging_bytes": 3 * CHUNK},
    "deferred": {"is_deferred": True},
    "bounded and deferred": {"staging_bytes": 3 * CHUNK, "is_deferred": True},
    "below one chunk": {"staging_bytes": 1},
}


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    monkeypatch.setattr(snapshot.take, "__kwdefaults__", {
        **snapshot.take.__kwdefaults__, "chunk_bytes": CHUNK,
    })  # fmt: skip
    return KINDS[request.param]


def make_arrays(seed: int = 0) -> dict[str, jax.Array]:
    """2 MB on fsdp 4 x tensor 2, in chunks of 64 KB."""
    place = NamedSharding(small_state.make_mesh(fsdp=4, tensor=2), P("fsdp", "tensor"))
    rng = np.random.default_rng(seed)
    return {
        f"w{n}": jax.device_put(rng.normal(size=(512, 256)).astype(np.float32), place)
        for n in range(4)
    }


def test_saves_of_a_bounded_or_deferred_copy_restore_bitwise(kind, tmp_path):
    saves = lifecycle.Checkpointer(tmp_path, keep=1, run_id="r", attempt=1, **kind)
    arrays = make_arrays()
    values = jax.device_get(arrays)
    step = jax.jit(lambda t: jax.tree.map(lambda x: x * 3 - 1, t), donate_argnums=0)
    saves.save(1, arrays, metadata=small_state.METADATA)
    abstract = small_state.abstract_of(arrays)
    arrays = step(arrays)  # donates at once
    jax.block_until_ready(arrays)
    saves.close()
    for bound in (1, float("inf")):
        found = restore.restore_latest(tmp_path, abstract, staging_bytes=bound)
        small_state.assert_same_bits(found.arrays, values)


def test_no_more_than_the_bound_waits_on_the_host(kind, tmp_path, monkeypatch):
    staged, most, lock = [0], [0], threading.Lock()
    copy, write = snapshot.host_copy, commits.write_synced

    def counted(source, *, is_whole):
        values = copy(source, is_whole=is_whole)
        with lock:
            staged[0] += values.nbytes
            most[0] = max(most[0], staged[0])
        return values

    def slow(path, pieces):
        time.sleep(0.002)
        write(path, pieces)
        with lock:
            staged[0] -= path.stat().st_size - 4

    monkeypatch.setattr(snapshot, "host_copy", counted)
    monkeypatch.setattr(commits, "write_synced", slow)
    saves = lifecycle.Checkpointer(tmp_path, keep=1, run_id="r", attempt=1, **kind)
    saves.save(1, make_arrays(), metadata=small_state.METADATA)
    saves.close()
    # What is written is counted a moment after there is room: one chunk a thread.
    slack = commits.THREADS * CHUNK
    assert most[0] <= max(kind.get("staging_bytes", 2 << 21), CHUNK) + slack


def assert_told_then_goes_on(folder, kind, patch, module, name, broken, *, says):
    """A save with `module.name` broken ends with that error; the next one is made."""
    saves = lifecycle.Checkpointer(folder, keep=1, run_id="r", attempt=1, **kind)
    with patch.context() as broken_so:
        broken_so.setattr(module, name, broken)
        saves.save(1, make_arrays(), metadata=small_state.METADATA)
        with pytest.raises(SaveError, match=says):
            saves.wait()
    saves.save(2, make_arrays(), metadata=small_state.METADATA)
    assert [report.step for report in saves.close()] == [2]


@pytest.mark.parametrize("secs", [0.0, 0.1], ids=["at once", "later"])
def test_a_failed_write_does_not_leave_the_caller_waiting(
    kind, secs, tmp_path, monkeypatch
):
    def full(path, pieces):
        time.sleep(secs)
        raise OSError(28, "No space left on device")

    broken = (commits, "write_synced", full)
    assert_told_then_goes_on(tmp_path, kind, monkeypatch, *broken, says="No space left")


def test_a_failed_copy_is_the_saves_error(kind, tmp_path, monkeypatch):
    copy, calls = snapshot.host_copy, []

    def fail(source, *, is_whole):
        calls.append(source)
        if len(calls) == 3:
            raise MemoryError("no memory for the copy")
        return copy(source, is_whole=is_whole)

    broken = (snapshot, "host_copy", fail)
    says = "no memory for the copy"
    assert_told_then_goes_on(tmp_path, kind, monkeypatch, *broken, says=says)


def test_replicas_share_the_writing_and_no_chunk_has_two_writers(tmp_path):
    mesh = small_state.make_mesh(data=4, fsdp=2)
    x = jnp.arange(64 * 64, dtype=jnp.float32).reshape(64, 64)
    arrays = {
        "whole": jax.device_put(x, NamedSharding(mesh, P())),
        "split": jax.device_put(x, NamedSharding(mesh, P("fsdp"))),
        "scale": jax.device_put(x[0], NamedSharding(mesh, P())),
        "bias": jax.device_put(x[1], NamedSharding(mesh, P())),
    }
    by_device: dict[int, int] = {}
    boxes = set()
    taken = snapshot.take(arrays, logical_shapes={}, chunk_bytes=1024)
    for turn, (name, array) in enumerate(arrays.items()):
        for source in snapshot._share(name, array, taken.layouts[name], turn):
            [device] = source.shard.devices()
            count = int(np.prod([b - a for a, b in source.box]))
            by_device[device.id] = by_device.get(device.id, 0) + count
            assert (name, source.box) not in boxes
            boxes.add((name, source.box))
    assert sum(by_device.values()) == 2 * 64 * 64 + 2 * 64
    assert len(by_device) == 8
    assert max(by_device.values()) <= 2 * min(by_device.values())
    taken.finish()
    digests = store.write_arrays(tmp_path, taken)
    assert sum(map(len, digests.values())) == len(boxes)


def test_a_window_of_a_shard_is_cut_by_its_device_under_any_mesh():
    from jaxinfra.checkpoint import staging

    array = make_arrays()["w0"]
    shard = array.addressable_shards[5]
    window = (slice(1, 7), slice(3, 4))
    with jax.set_mesh(array.sharding.mesh):
        found = staging.cut_on_device(shard.data, window)
    assert found.devices() == shard.data.devices()
    np.testing.assert_array_equal(found, np.asarray(shard.data)[window])
