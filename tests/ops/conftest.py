"""Meshes that a test runs on: set while it runs, and never left set."""

import jax
import pytest

from jaxinfra import mesh as mesh_lib

FOUR = {"fsdp": 2, "tensor": 2}


def _set(sizes, count):
    return jax.set_mesh(mesh_lib.make_mesh(sizes, devices=jax.devices()[:count]))


@pytest.fixture
def one_device():
    with _set({}, 1):
        yield jax.sharding.get_mesh()


@pytest.fixture
def four_devices():
    """fsdp 2 x tensor 2."""
    with _set(FOUR, 4):
        yield jax.sharding.get_mesh()


@pytest.fixture(params=["one device", "fsdp 2 x tensor 2"])
def each_mesh(request):
    sizes, count = ({}, 1) if request.param == "one device" else (FOUR, 4)
    with _set(sizes, count):
        yield jax.sharding.get_mesh()
