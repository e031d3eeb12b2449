"""Where every array lives: logical names of dims -> mesh axes, in one table.

`Rules` is the table, `spec` the one function that makes a PartitionSpec from it. The
table differs between parameters, gradients and optimizer state only in the row `embed`:
that is all that ZeRO is (`Layout`, `make_layout`).
"""

import dataclasses
import math
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.config import ZERO_AXES
from jaxinfra.mesh import all_gather as all_gather
from jaxinfra.mesh import all_reduce as all_reduce
from jaxinfra.mesh import among as among
from jaxinfra.mesh import axes_of as axes_of
from jaxinfra.mesh import gathered as gathered
from jaxinfra.mesh import zero_axes as zero_axes

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Mesh axes that split a dim of this logical name; () splits it over none."""

    batch: Axes = ("data", "fsdp", "expert")
    length: Axes = ("context",)
    residual: Axes = ("context",)  # T between layers: tasks.activation_rules
    width: Axes = ()  # D of activations
    embed: Axes = ZERO_AXES  # D of parameters, the dim that ZeRO shards
    heads: Axes = ("tensor",)  # K, the groups of query heads with one key head
    ffn: Axes = ("tensor",)
    vocab: Axes = ("pipeline", "tensor")  # a pipeline's stages share the head
    experts: Axes = ("expert",)
    rows: Axes = ("data", "fsdp")  # of a batch whose tokens are with their experts
    layers: Axes = ("pipeline",)


class Layout(NamedTuple):
    """A mesh and the rules for what lives on it; activations follow `params`."""

    mesh: jax.sharding.Mesh
    params: Rules
    grads: Rules
    optimizer: Rules


# Which key to change when a dim does not divide over a mesh axis.
_KEYS = {
    "batch": "train.batch_size",
    "length": "train.length",
    "embed": "model.width",
    "heads": "model.num_kv_heads",
    "ffn": "model.ffn_width",
    "experts": "model.num_experts",
}


def spec(rules: Rules, *names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with dims of these logical names (None: whole), as
    `axes_here` has them; `embed` beside `experts` without the axes of that.

    Errors: ValueError for a name that is not in the table, or a mesh axis used twice.
    """
    entries, used = [], set()
    for name in names:
        if name is not None and not hasattr(rules, name):
            raise ValueError(
                f"{name!r} is no logical name; use one of {(*vars(rules),)}"
            )
        axes = () if name is None else axes_here(rules, name)
        if name == "embed" and "experts" in names:
            axes = tuple(axis for axis in axes if axis not in rules.experts)
        if twice := used.intersection(axes):
            raise ValueError(
                f"dims {names} use mesh axis {sorted(twice)[0]!r} twice; "
                "one array can be split only once over an axis"
            )
        used.update(axes)
        entries.append(axes)
    return PartitionSpec(*entries)


def axes_here(rules: Rules, *names: str) -> Axes:
    """The mesh axes that split dims of these logical names. Inside a shard_map those
    that it left: along the others a device has a part of its own already."""
    taken = jax.sharding.get_abstract_mesh().manual_axes
    axes = tuple(axis for name in names for axis in getattr(rules, name))
    return tuple(axis for axis in axes if axis not in taken)


def sharding(
    layout: Layout,
    rules: Rules,
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    array: str = "array",
) -> NamedSharding:
    """The sharding of an array; ValueError, with the key to change, if a dim does not
    divide over its axes."""
    place = NamedSharding(layout.mesh, spec(rules, *names))
    for dim, (size, name) in enumerate(zip(shape, names, strict=True)):
        axes = axes_of(place.spec[dim])
        parts = axis_product(layout.mesh, axes)
        if size % parts:
            raise ValueError(
                f"{array}: dim {dim} ({name}) of size {size} does not divide over mesh "
                f"axes {axes} of size {parts}; "
                f"change {_KEYS.get(name, 'the shape')} or "
                f"mesh.{axes[0]}"
            )
    return place


def axis_product(mesh: jax.sharding.Mesh, axes: Axes) -> int:
    """Number of parts that `axes` cut a dim into."""
    parts = 1
    for axis in axes:
        parts *= mesh.shape[axis]
    return parts


def make_layout(mesh: jax.sharding.Mesh, *, zero: int = 3) -> Layout:
    """What ZERO_AXES shard: zero 0 nothing, 1 optimizer state, 2 and gradients, 3 and
    parameters. A pipeline, which leaves `expert` and `context` to the types of arrays,
    has parameters and gradients whole over these. Source: arXiv:1910.02054 section 5.
    """
    sharded, whole = Rules(), Rules(embed=())
    used = Rules(embed=("fsdp",)) if mesh.shape["pipeline"] > 1 else sharded
    return Layout(
        mesh=mesh,
        params=used if zero >= 3 else whole,
        grads=used if zero >= 2 else whole,
        optimizer=sharded if zero >= 1 else whole,
    )


def bytes_per_device(tree) -> int:
    """Bytes of a tree of arrays, or of shapes with shardings, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
