"""Devices of several slices or nodes, which a slow network joins."""

from collections.abc import Mapping

import jax
import numpy as np

from jaxinfra import mesh
from jaxinfra.config import AXES


def across_slices(
    sizes: Mapping[str, int], devices: list[jax.Device], slices: int
) -> np.ndarray:
    """Device array whose slow axis is outermost."""
    slow = slow_axis(sizes, slices)
    inner = [n // slices if axis == slow else n for axis, n in sizes.items()]
    blocks = [mesh.within(inner, group) for group in _groups(devices, slices)]
    return np.concatenate(blocks, axis=AXES.index(slow))


def slow_axis(sizes: Mapping[str, int], slices: int) -> str:
    """The mesh axis, data or pipeline, under which the slow network is."""
    for axis in ("data", "pipeline"):
        if sizes[axis] % slices == 0:
            return axis
    raise ValueError(
        f"mesh.slices={slices} divides neither mesh.data={sizes['data']} nor "
        f"mesh.pipeline={sizes['pipeline']}; set mesh.data to a multiple of it"
    )


def _groups(devices: list[jax.Device], slices: int) -> list[list[jax.Device]]:
    """The devices of each slice: of a TPU's, else of as many neighbouring processes."""
    if devices[0].platform == "tpu":
        of = lambda device: getattr(device, "slice_index", 0)  # one slice: may lack it
        numbers = sorted({of(device) for device in devices})
        groups = [[d for d in devices if of(d) == number] for number in numbers]
    else:
        # Not one a process: launchers may start one for each of a node's devices.
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        groups = [list(group) for group in np.array_split(np.array(ordered), slices)]
    counts = [len(group) for group in groups]
    if counts != [len(devices) // slices] * slices:
        raise ValueError(
            f"mesh.slices={slices} and the {len(devices)} devices are in {len(groups)} "
            f"slices of {counts}; set mesh.slices to {len(groups)}"
        )
    return groups
