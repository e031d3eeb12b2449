"""The mesh: six axes always, and errors that name the key."""

import jax
import pytest

from jaxinfra import mesh as mesh_lib
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
