import contextlib
import threading
import time
import traceback
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxinfra.config import DataError
from jaxinfra.data import device, digests
from jaxinfra.data.batches import make_evaluation, make_stream
from jaxinfra.data.packing import Batch

AXES = ("data", "fsdp", "expert", "context", "tensor", "pipeline")
MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 4, 1), (4, 1, 2), (2, 2, 2)]
LENGTH, BATCH_SIZE = 6, 8
SWAPPED = [5, 1, 2, 3, 4, 0, 6, 7]


def rows_over(data, fsdp, tensor):
    """Rows over data x fsdp of an Explicit mesh with all six axes."""
    sizes = (data, fsdp, 1, 1, tensor, 1)
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = jax.make_mesh(sizes, AXES, (AxisType.Explicit,) * 6, devices=devices)
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))


def digest_numpy(tokens, segments):
    """The digest by its definition, one element after the other."""

    def mix(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    total = 0
    for (row, column), token in np.ndenumerate(tokens):
        h = mix((row + 0x9E3779B9) % 2**32)
        for value in (column, int(token), int(segments[row, column])):
            h = mix((h + value) % 2**32)
        total += h
    return total % 2**32


@pytest.fixture
def stream(make_split):
    split = make_split([7, 31, 3, 19, 64, 1, 11])
    return make_stream(split, length=LENGTH, batch_size=BATCH_SIZE, seed=1)


def put(rows, step, sharding):
    return device.to_device(rows, step, batch_size=BATCH_SIZE, sharding=sharding)


@pytest.mark.parametrize("sizes", MESHES)
def test_a_global_batch_is_the_host_batch_on_every_mesh(stream, sizes):
    sharding = rows_over(*sizes)
    batch = put(stream.batch, 3, sharding)
    host = stream.batch(3)
    assert type(batch) is type(host)
    assert batch.weights_BT1 is None
    for array, expected in zip(batch[:2], host[:2], strict=True):
        assert array.sharding == sharding
        assert array.dtype == expected.dtype
        assert np.array_equal(array, expected)


@pytest.mark.parametrize("sizes", MESHES)
def test_the_digest_is_that_of_the_definition_on_every_mesh(stream, sizes):
    sharding = rows_over(*sizes)
    host = stream.batch(3)
    batch = put(stream.batch, 3, sharding)
    with jax.set_mesh(sharding.mesh):
        found = jax.jit(digests.digest)(batch)
    assert found.dtype == np.uint32
    assert found.shape == ()
    assert int(found) == digest_numpy(*host.per_token[:2])


def test_the_digest_needs_no_mesh(stream):
    host = stream.batch(0)
    assert int(jax.jit(digests.digest)(host)) == digest_numpy(*host.per_token[:2])


def test_the_digest_sees_rows_columns_tokens_and_segments_change(stream):
    tokens, segments, _ = stream.batch(0).per_token
    token, segment = tokens.copy(), segments.copy()
    token[2, 3] ^= 1
    segment[2, 3] ^= 1
    found = {
        int(jax.jit(digests.digest)((t, s)))
        for t, s in [
            (tokens, segments),
            (tokens[SWAPPED], segments[SWAPPED]),
            (tokens[:, ::-1], segments[:, ::-1]),
            (token, segments),
            (tokens, segment),
        ]
    }
    assert len(found) == 5


class Images(NamedTuple):
    """Arrays of three ranks and one that is absent."""

    pixels_BHW: np.ndarray
    labels_B: np.ndarray
    nothing: None
    boxes_B4: np.ndarray


@pytest.mark.parametrize("sizes", MESHES)
def test_arrays_of_any_rank_go_to_devices_by_their_rows(sizes):
    rng = np.random.default_rng(0)
    whole = Images(
        rng.integers(0, 256, (BATCH_SIZE, 3, 5), np.uint8),
        rng.integers(0, 10, BATCH_SIZE, np.int32),
        None,
        rng.random((BATCH_SIZE, 4), np.float32),
    )

    def rows(step, positions):
        return Images(*(None if x is None else x[positions] for x in whole))

    sharding = rows_over(*sizes)
    images = put(rows, 0, sharding)
    assert type(images) is Images
    assert images.nothing is None
    for array, expected in zip(images, whole, strict=True):
        if expected is not None:
            assert array.dtype == expected.dtype
            assert array.sharding.spec[0] == ("data", "fsdp")
            assert np.array_equal(array, expected)
    with jax.set_mesh(sharding.mesh):
        found = int(jax.jit(digests.digest)(images))
    whole = whole._replace(labels_B=whole.labels_B[SWAPPED])
    swapped = put(rows, 0, sharding)
    with jax.set_mesh(sharding.mesh):
        assert int(jax.jit(digests.digest)(swapped)) != found


def test_rows_are_read_once_and_only_those_that_the_devices_need(stream):
    calls = []

    def rows(step, positions):
        calls.append((step, positions.tolist()))
        return stream.batch(step, positions)

    put(rows, 3, rows_over(2, 2, 2))
    assert calls == [(3, list(range(BATCH_SIZE)))]


class HostSharding:
    """One host's view of a sharding: devices of other hosts are not addressable."""

    def __init__(self, sharding, devices):
        self.sharding = sharding
        self.devices = devices

    def addressable_devices_indices_map(self, shape):
        blocks = self.sharding.devices_indices_map(shape)
        return {d: blocks[d] for d in self.devices}


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_each_host_reads_its_own_rows_and_together_they_read_all(
    stream, monkeypatch, num_hosts
):
    sharding = rows_over(2, 4, 1)
    devices = list(sharding.mesh.devices.flat)
    expected = stream.batch(3).tokens_BT1
    blocks = {}

    def assemble(shape, host, block, dtype):
        for d, index in host.addressable_devices_indices_map(shape).items():
            blocks[d] = (index, block(index))

    monkeypatch.setattr(jax, "make_array_from_callback", assemble)
    num_read = []

    def rows(step, positions):
        num_read.append(len(positions))
        return Batch(*[stream.batch(step, positions).tokens_BT1] * 2)

    for part in np.split(np.array(devices), num_hosts):

        def seen_by_host(*given, part=part):
            return HostSharding(NamedSharding(*given), part)

        monkeypatch.setattr(jax, "NamedSharding", seen_by_host)
        put(rows, 3, sharding)
    assert num_read == [BATCH_SIZE // num_hosts] * num_hosts
    assert set(blocks) == set(devices)
    assert all(np.array_equal(expected[i], b) for i, b in blocks.values())


def test_evaluation_batches_go_to_devices_too(stream):
    evaluation = make_evaluation(
        stream.sources.rows[0].split, length=LENGTH, batch_size=BATCH_SIZE
    )
    last = evaluation.num_batches - 1
    batch = put(evaluation.batch, last, rows_over(2, 4, 1))
    assert np.array_equal(batch.segments_BT1, evaluation.batch(last).segments_BT1)


def test_rows_that_do_not_divide_over_the_mesh_are_an_error(stream):
    with pytest.raises(DataError, match=r"train.batch_size=6 rows .* multiple"):
        device.to_device(stream.batch, 0, batch_size=6, sharding=rows_over(2, 2, 1))


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [0, 1, 2, 9])
def test_prefetch_gives_every_step_in_order_and_ends_its_thread(depth):
    fetched = list(device.prefetch(lambda k: k * k, 3, 8, depth=depth))
    assert [(f.step, f.batch) for f in fetched] == [(k, k * k) for k in range(3, 8)]
    assert all(f.wait_secs >= 0 for f in fetched)
    assert not prefetch_threads()
    assert list(device.prefetch(lambda k: k, 3, 3, depth=depth)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_runs_no_more_than_depth_steps_ahead(depth):
    made = []
    with contextlib.closing(device.prefetch(made.append, 0, 50, depth=depth)) as steps:
        for fetched in steps:
            time.sleep(0.01)
            assert len(made) <= fetched.step + 1 + depth
            if fetched.step == 5:
                break
    assert len(made) <= 6 + depth
    assert not prefetch_threads()


def test_prefetch_measures_the_wait_and_work_hides_it():
    made = [threading.Event() for _ in range(4)]

    def slow(step):
        time.sleep(0.05)
        made[step].set()

    with contextlib.closing(device.prefetch(slow, 0, 4, depth=2)) as steps:
        assert next(steps).wait_secs > 0.04
        assert made[1].wait(10)
        time.sleep(0.01)
        assert next(steps).wait_secs < 0.04


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetch_raises_at_the_step_that_failed_with_its_traceback(depth):
    def broken_disk(step):
        if step == 2:
            raise OSError("unreadable")
        return step

    seen = []
    steps = device.prefetch(broken_disk, 0, 9, depth=depth)
    with pytest.raises(OSError, match="unreadable") as caught:
        seen.extend(fetched.step for fetched in steps)
    assert seen == [0, 1]
    names = [f.name for f in traceback.extract_tb(caught.tb)]
    assert names[-1] == "broken_disk"
    assert not prefetch_threads()


def test_prefetch_closed_while_a_batch_is_made_waits_for_that_one_only():
    started, release, made = threading.Event(), threading.Event(), []

    def make(step):
        if step == 1:
            started.set()
            release.wait(10)
        made.append(step)

    steps = device.prefetch(make, 0, 50, depth=4)
    next(steps)
    assert started.wait(10)
    threading.Timer(0.05, release.set).start()
    steps.close()
    assert made == [0, 1]
    assert not prefetch_threads()


def test_prefetch_with_a_negative_depth_is_an_error():
    with pytest.raises(DataError, match="depth=-1"):
        device.prefetch(lambda k: k, 0, 1, depth=-1)


def test_a_batch_that_does_not_come_is_given_up():
    never, asked = threading.Event(), []
    batches = device.prefetch(
        lambda step: never.wait(60) if step else step,
        0,
        9,
        gives_up=lambda: asked.append(1) or len(asked) > 1,
    )
    assert [fetched.step for fetched in batches] == [0]
    assert len(asked) == 2
    never.set()


def test_what_cannot_be_had_ends_batches_and_is_told():
    def make(step):
        if step == 3:
            raise DataError("gone")
        return step

    failed = []
    batches = device.until_none_comes(device.prefetch(make, 0, 9), failed)
    assert [fetched.batch for fetched in batches] == [0, 1, 2]
    assert [str(error) for error in failed] == ["gone"]
