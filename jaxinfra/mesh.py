"""The device mesh: six named axes, always all present, of size 1 when unused.

`data` only replicates, `fsdp` shards parameters (ZeRO), `expert`, `context`, `tensor`
and `pipeline` split experts, length, width and depth; what is whole along `expert` and
`context` otherwise, ZeRO shards over them too. All axes are of Explicit type: the
sharding of every array is part of its type and is checked while tracing.

Below: what a partition is over some axes, and the collectives that follow one inside a
shard_map; `sharding` has them under its name too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec

import jaxinfra
from jaxinfra.config import AXES

HOST = "pinned_host"  # the kind of the host's memory that devices address


def make_mesh(
    sizes: Mapping[str, int] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    slices: int = 1,
) -> jax.sharding.Mesh:
    """A mesh of `sizes` (absent axes have size 1) over `devices` (default: all).

    `slices` > 1 puts the slow network between slices or nodes under `data`, or under
    `pipeline` where `data` does not divide. Errors: ValueError where the product of the
    sizes is not the number of devices.
    """
    if unknown := set(sizes or {}) - set(AXES):
        raise ValueError(f"{sorted(unknown)} are no mesh axes; they are {AXES}")
    sizes = {axis: (sizes or {}).get(axis, 1) for axis in AXES}
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(sizes.values())
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"a mesh of {sizes} needs {math.prod(shape)} devices and there are "
            f"{len(devices)}; set mesh.data, mesh.fsdp ... to -1 to take the rest"
        )
    if slices > 1:
        # By its public name, which loads the module: one slice needs none of it.
        array = jaxinfra.across_slices(sizes, devices, slices)
    else:
        array = within(shape, devices)
    explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
    return jax.sharding.Mesh(array, AXES, axis_types=explicit)


def platform() -> str:
    """Platform of the mesh that is set, which may be one compiled for from afar."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "platform", None) or jax.default_backend()


def gathered(partition: PartitionSpec, *axes: str) -> PartitionSpec:
    """`partition` without `axes`; without those of ZeRO where none are given: how a
    parameter is laid out while it is used."""
    if not axes:
        return PartitionSpec(*(None if zero_axes(e) else e for e in partition))
    named = {name for entry in partition for name in axes_of(entry)}
    return among(partition, tuple(named - {*axes}))


def zero_axes(*entries: Any) -> tuple[str, ...]:
    """The axes over which ZeRO splits the dims of a parameter that have these entries
    of its PartitionSpec: `fsdp` splits no other dim, and what does beside it is one."""
    return tuple(a for e in entries if "fsdp" in axes_of(e) for a in axes_of(e))


def all_gather(local: jax.Array, partition: PartitionSpec):
    """Inside a shard_map: the part of an array laid out as `partition`, made whole over
    ZeRO's axes. Its transpose is a reduce-scatter."""
    for dim, entry in enumerate(partition):
        if cut := zero_axes(entry):
            local = jax.lax.all_gather(local, cut, axis=dim, tiled=True)
    return local


def all_reduce(local: jax.Array, partition: PartitionSpec, axes: tuple[str, ...]):
    """Inside a shard_map: the sum over `axes`, of which each device keeps its part
    along those of ZeRO's axes that split a dim of `partition`, else all."""
    for dim, entry in enumerate(partition):
        if cut := tuple(axis for axis in zero_axes(entry) if axis in axes):
            axes = tuple(axis for axis in axes if axis not in cut)
            local = jax.lax.psum_scatter(local, cut, scatter_dimension=dim, tiled=True)
    return jax.lax.psum(local, axes)


def among(partition: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """`partition` as far as it is over `axes`."""
    entries = []
    for entry in partition:
        kept = tuple(name for name in axes_of(entry) if name in axes)
        entries.append(kept if len(kept) > 1 else kept[0] if kept else None)
    return PartitionSpec(*entries)


def within(shape: Sequence[int], devices: list[jax.Device]) -> np.ndarray:
    """Devices that a fast network joins, in an order that suits it, of this shape."""
    if len(devices) == 1 or devices[0].platform == "cpu":
        # mesh_utils would order host devices by process; their own order is as good.
        return np.array(devices).reshape(shape)
    # An axis may take a part of a ring of chips, as fsdp 8 x tensor 2 do on a 4x4.
    return mesh_utils.create_device_mesh(
        shape, devices=devices, allow_split_physical_axes=True
    )


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry
