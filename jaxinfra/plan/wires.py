"""Collectives of a compiled program: what each puts on the wire, and over which axes.

Bytes are those that a device sends in a ring over a group of n: (n - 1) / n of the
whole for a gather or scatter, twice that for an all-reduce. A permutation's are those
of the busiest link of a ring over its axis, each pair by the shorter way. A ragged
all-to-all is taken to be even: its program has no word of how many rows go, but one
side is a device's own rows, to the other experts or back, and the other is room for
more, so (n - 1) / n of the smaller side goes.
Source: Patarasuk and Yuan, 2009, doi 10.1016/j.jpdc.2008.09.002.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxinfra.plan.program import COLLECTIVES, Instruction, Program

Axes = Mapping[str, int]  # mesh axis -> size, in the order of the mesh
HOST = "host"  # in the place of mesh axes, of a copy to the host's memory or from it
SLICES = "slices"  # likewise, of what goes from a TPU's slice to others
_KERNELS = ("tpu_custom_call", "__cudnn$fmha", "mosaic_gpu", "triton_kernel_call")


class Wire(NamedTuple):
    """One collective: its kind, the mesh axes over which it goes ("?" where they could
    not be told), and the bytes that a device sends. near: where it goes from node to
    node, how many devices of a node take part together; else 0."""

    kind: str
    axes: str
    bytes: float
    near: int = 0


def is_kernel(line: Instruction) -> bool:
    """Whether this call is a kernel for which the compiler tells neither time nor
    FLOPs."""
    return any(f'custom_call_target="{name}' in line.rest for name in _KERNELS)


def kernel_name(line: Instruction) -> str:
    """By which `line`, a kernel, is counted: Pallas names one of a GPU after nothing
    but itself."""
    if 'custom_call_target="mosaic_gpu' in line.rest:
        return "mosaic_gpu"
    return re.sub(r"[.\d]+$", "", line.name)


def of(
    line: Instruction,
    where: str,
    axes: Axes | None,
    node: int = 0,
    *,
    program: Program | None = None,
) -> Wire:
    """The collective that `line` of computation `where` is, or starts; `node`: so many
    devices that follow each other are one, 0 where there is one network for all.
    program: that of the line, without which a ragged all-to-all is a ValueError."""
    groups = _groups(line)
    found = _within_one_network(line, groups, where, axes, program)
    return found._replace(near=_near(groups, node) if node else 0)


def _within_one_network(
    line: Instruction,
    groups: list[list[int]],
    where: str,
    axes: Axes | None,
    program: Program | None,
) -> Wire:
    kind = line.op.removesuffix("-start")
    is_start = line.op.endswith("-start")
    n = max((len(g) for g in groups), default=_size_of_groups(line))
    is_at_home = groups and all(len(set(group)) == 1 for group in groups)
    if is_at_home or "source_target_pairs={}" in line.rest:  # nobody sends: own, zeros
        return Wire(kind, "none", 0.0)
    sizes, count = [shape.bytes for shape in line.out], len(line.operands)
    if kind == "ragged-all-to-all":  # rows, and the room where others' rows arrive
        if program is None:
            raise ValueError(f"{line.name}: its operands' shapes need the program")
        given = [program.shapes_of(where, name) for name in line.operands[:2]]
        sizes = [min(sum(shape.bytes for shape in shapes) for shapes in given)]
    elif is_start and len(sizes) >= 2 * count > 0:  # operands, results, flags
        sizes = sizes[count : 2 * count]
    whole = sum(sizes)
    name = spanned(groups, axes) if axes else "?"
    if "all-reduce-scatter" in where:  # an all-reduce whose fusion keeps one part
        return Wire("reduce-scatter", name, whole * (n - 1) / n)
    sent = {
        "all-gather": whole * (n - 1) / n,
        "all-reduce": 2 * whole * (n - 1) / n,
        "reduce-scatter": whole * (n - 1),
        "all-to-all": whole * (n - 1) / n,
        "ragged-all-to-all": whole * (n - 1) / n,
    }
    if kind == "collective-permute" and axes:
        return Wire(kind, name, whole * _load(groups, axes))
    return Wire(kind, name, sent.get(kind, whole))


def between_slices(line: Instruction) -> Wire | None:
    """What a send of a TPU's program, which is of one slice, hands to the network
    between slices; None where it is another kind of send."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.rest)
    if not found:
        return None
    # As in {1,2}x{0:7}: of slices 1 and 2, all eight chips. Pairs need no number.
    target = re.search(r'_xla_megascale_target="\{([\d,]+)\}x', line.rest)
    n = target[1].count(",") + 1 if target else 1
    own = line.out[0].bytes
    sent = {
        "ALL_GATHER": own * (n - 1),
        "ALL_REDUCE": 2 * own * (n - 1) / n,
        "REDUCE_SCATTER": own * (n - 1) / n,
        "ALL_TO_ALL": own * (n - 1) / n,
    }
    kind = found[1].lower().replace("_", "-")
    return Wire(kind, SLICES, sent.get(found[1], own) if target else own, near=1)


def within(
    program: Program, computation: str, axes: Axes | None, node: int = 0
) -> list[Wire]:
    """The collectives of a computation and of its fusions, one a channel."""
    found: dict[str, Wire] = {}
    for line in program[computation]:
        if line.op.removesuffix("-start") in COLLECTIVES:
            wire = of(line, computation, axes, node, program=program)
            found.setdefault(line.channel, wire)
        elif line.op in ("fusion", "call"):
            for name in line.called:
                for wire in within(program, name, axes, node):
                    found.setdefault(f"{name}{wire}", wire)
    return list(found.values())


def channels(program: Program, computation: str) -> list[str]:
    """Channels of the collectives of a computation, each once."""
    lines = (
        line
        for line in program[computation]
        if line.op.removesuffix("-start") in COLLECTIVES
    )
    return list(dict.fromkeys(line.channel for line in lines))


def spanned(groups: Sequence[Sequence[int]], axes: Axes) -> str:
    """The mesh axes along which devices of a group differ, as in "fsdp" or
    "data+fsdp". A device's number is its place in the mesh."""
    moving: set[str] = set()
    for group in groups:
        places = [_place(number, axes) for number in group]
        moving |= {
            axis
            for i, axis in enumerate(axes)
            if len({place[i] for place in places}) > 1
        }
    return "+".join(axis for axis in axes if axis in moving) or "?"


def _near(groups: Sequence[Sequence[int]], node: int) -> int:
    """How many devices of a node are in one group, the fewest of those groups that are
    on several nodes, 0 if none is."""
    on = [Counter(number // node for number in group) for group in groups]
    return min((max(n.values()) for n in on if len(n) > 1), default=0)


def _load(pairs: Sequence[Sequence[int]], axes: Axes) -> int:
    """How many of the pairs share the busiest link, one way, where an axis is a ring.
    Limits: so a GPU's switch is charged too much, and a TPU, of whose links the rate is
    of all, too little; pairs along several axes have links of their own."""
    used: Counter[tuple] = Counter()
    for pair in pairs:
        source, target = (_place(number, axes) for number in pair)
        moved = [
            i for i, (a, b) in enumerate(zip(source, target, strict=True)) if a != b
        ]
        if len(moved) != 1:
            continue
        [axis], size = moved, list(axes.values())[moved[0]]
        way = (target[axis] - source[axis]) % size
        step, hops = (1, way) if way <= size - way else (-1, size - way)
        rest = source[:axis] + source[axis + 1 :]
        for hop in range(hops):
            used[axis, rest, (source[axis] + step * hop) % size, step] += 1
    return max(used.values(), default=1)


def _place(number: int, axes: Axes) -> tuple[int, ...]:
    place = []
    for size in reversed(axes.values()):
        number, index = divmod(number, size)
        place.append(index)
    return tuple(reversed(place))


def _groups(line: Instruction) -> list[list[int]]:
    """Device numbers of each group: {{0,1},{2,3}}, [groups,size]<=[dims]T(order), or
    source_target_pairs."""
    text = line.rest
    if found := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return _braces(found[1])
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", text):
        return _braces(found[1])
    form = r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(form, text):
        count, size = int(found[1]), int(found[2])
        dims = [int(n) for n in found[3].split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else range(len(dims))
        strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
        spans = [range(dims[i]) for i in order]
        flat = [
            sum(index * strides[i] for index, i in zip(indices, order, strict=True))
            for indices in itertools.product(*spans)
        ]
        return [flat[g * size : (g + 1) * size] for g in range(count)]
    # mesh['data'=2,'fsdp'=4], device_ids=([4,2]T(1,0)) {'fsdp'}
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    form = rf"replica_groups=mesh\[([^\]]*)\]{order}\s*\{{([^}}]*)\}}"
    if found := re.search(form, text):
        sizes = {a: int(n) for a, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        numbers = np.arange(math.prod(sizes.values()))
        if found[2]:
            numbers = numbers.reshape([int(n) for n in found[2].split(",")])
        if found[3]:
            numbers = numbers.transpose([int(n) for n in found[3].split(",")])
        together = re.findall(r"'([^']+)'", found[4])
        last = [i for i, axis in enumerate(sizes) if axis in together]
        first = [i for i in range(len(sizes)) if i not in last]
        numbers = numbers.reshape([*sizes.values()]).transpose(first + last)
        size = math.prod(sizes[axis] for axis in together)
        return numbers.reshape(-1, size).tolist()
    return []


def _braces(text: str) -> list[list[int]]:
    return [
        [int(n) for n in group.split(",") if n.strip()]
        for group in re.findall(r"\{([\d, ]*)\}", text)
    ]


def _size_of_groups(line: Instruction) -> int:
    """Where no group could be read: all that the line itself may say, else 1."""
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]", line.rest)
    return int(found[2]) if found else 1
