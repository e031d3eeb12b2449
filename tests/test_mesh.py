"""The mesh: six axes always, and errors that name the key."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from jaxinfra import mesh as mesh_lib
from jaxinfra import slices
from jaxinfra.config import AXES


def test_all_six_axes_are_there_in_order_and_explicit():
    mesh = mesh_lib.make_mesh({"tensor": 2, "fsdp": 4})
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape.values()) == (1, 4, 1, 1, 2, 1)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def test_devices_stand_in_their_own_order_with_the_last_axis_fastest():
    mesh = mesh_lib.make_mesh({"fsdp": 2, "tensor": 2}, devices=jax.devices()[4:])
    assert list(mesh.devices.flat) == jax.devices()[4:]
    assert list(mesh.devices[0, 1, 0, 0, :, 0]) == jax.devices()[6:]


def test_one_device_needs_no_sizes():
    assert mesh_lib.make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize("sizes", [None, {"fsdp": 3}, {"data": 4, "tensor": 4}])
def test_sizes_that_do_not_make_the_number_of_devices_are_refused(sizes):
    rule = r"needs \d+ devices and there are 8; set mesh.data"
    with pytest.raises(ValueError, match=rule):
        mesh_lib.make_mesh(sizes)


def test_slices_that_divide_neither_slow_axis_are_refused():
    rule = (
        "mesh.slices=3 divides neither mesh.data=4 nor mesh.pipeline=1; set mesh.data"
    )
    with pytest.raises(ValueError, match=rule):
        mesh_lib.make_mesh({"data": 4, "fsdp": 2}, slices=3)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device of several nodes."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "H100"


@pytest.mark.parametrize("processes_a_node", [1, 4])
@pytest.mark.parametrize("slow", ["data", "pipeline"])
def test_the_slow_network_is_crossed_along_one_axis_alone(slow, processes_a_node):
    """Two nodes of four devices: along every other axis a node is not left."""
    each = 4 // processes_a_node
    devices = [Device(i, i // each) for i in range(8)]
    sizes = dict.fromkeys(AXES, 1) | {slow: 2, "fsdp": 2, "tensor": 2}
    array = slices.across_slices(sizes, devices[::-1], 2)
    assert array.shape == tuple(sizes.values())
    node = np.vectorize(lambda device: device.process_index // processes_a_node)(array)
    for axis, name in enumerate(AXES):
        crossed = (np.diff(node, axis=axis) != 0).any()
        assert crossed == (name == slow), name


def test_the_slow_axis_is_outermost_of_a_longer_one():
    devices = [Device(i, i // 4) for i in range(8)]
    sizes = dict.fromkeys(AXES, 1) | {"data": 4, "tensor": 2}
    array = slices.across_slices(sizes, devices, 2)
    node = np.vectorize(lambda device: device.process_index)(array)
    assert node[:, 0, 0, 0, 0, 0].tolist() == [0, 0, 1, 1]


def test_simulated_devices_can_stand_for_slices():
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 4}, slices=2)
    assert list(mesh.devices[0].flat) == jax.devices()[:4]


@pytest.mark.parametrize("told", [{"slice_index": 0}, {}])
def test_slices_that_are_not_there_are_refused(told):
    @dataclasses.dataclass(frozen=True)
    class Tpu(Device):
        platform: str = "tpu"

    for name, value in told.items():  # a topology of one slice may have none
        setattr(Tpu, name, value)
    sizes = dict.fromkeys(AXES, 1) | {"data": 2}
    devices = [Tpu(i, 0) for i in range(2)]
    with pytest.raises(
        ValueError, match=r"are in 1 slices of .2.; set mesh.slices to 1"
    ):
        slices.across_slices(sizes, devices, 2)


def test_axes_may_share_a_ring_of_chips():
    chips = [
        types.SimpleNamespace(
            id=x + 4 * y,
            platform="tpu",
            device_kind="TPU v5 lite",
            process_index=0,
            coords=(x, y, 0),
            core_on_chip=0,
        )
        for y in range(4)
        for x in range(4)
    ]
    found = mesh_lib.within((1, 8, 1, 1, 2, 1), chips)
    assert sorted(chip.id for chip in found.flat) == list(range(16))
    # Neighbours along tensor are neighbours on the chips' torus.
    for one, other in found.reshape(8, 2):
        steps = [(a - b) % 4 for a, b in zip(one.coords, other.coords, strict=True)]
        assert sum(min(step, 4 - step) for step in steps) == 1
