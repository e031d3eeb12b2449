"""What one instruction of a compiled program does: FLOPs of its matmuls, and the bytes
that it moves in the device's memory and to the host's."""

import re
from collections.abc import Iterator, Sequence

from jaxinfra.plan.program import Instruction, Program, Shape


def matmul_flops(
    program: Program, where: str, line: Instruction, *, few_bits: float = 1.0
) -> float:
    """2MKN of the matmuls of one instruction, those fused into it included; one of
    8-bit operands counts `few_bits`."""
    return sum(flops for _, flops in matmuls(program, where, line, few_bits=few_bits))


def matmuls(
    program: Program, where: str, line: Instruction, *, few_bits: float = 1.0
) -> Iterator[tuple[str, float]]:
    """(scope, FLOPs) of each of them; one without a scope has that of its fusion."""
    if line.op == "fusion":
        for name in line.called:
            for inner in program[name]:
                found = matmuls(program, name, inner, few_bits=few_bits)
                yield from ((scope or line.scope, flops) for scope, flops in found)
    elif flops := _of_one(program, where, line, few_bits):
        yield line.scope, flops


def moved_bytes(program: Program, where: str, line: Instruction) -> float:
    """What an instruction reads and writes; of an array from which it takes a slice, or
    which it updates in place, that slice."""
    return sum(size for _, size in _arrays(program, where, line))


def host_bytes(program: Program, where: str, line: Instruction) -> float:
    """What an instruction copies, or starts to, between the memories of device and
    host; a fusion reads and writes the host's in place."""
    if line.op.endswith("-start"):  # the device's side is the part that is copied
        if not any(shape.is_host for shape in line.out):
            return 0.0
        return max((x.bytes for x in line.out if not x.is_host), default=0.0)
    if line.op not in ("copy", "fusion", "dynamic-slice", "dynamic-update-slice"):
        return 0.0
    return sum(size for shape, size in _arrays(program, where, line) if shape.is_host)


def _of_one(program: Program, where: str, line: Instruction, few_bits: float) -> float:
    """FLOPs of the matmul that `line` is, 0 if it is none."""
    is_gemm = line.op == "custom-call" and "__cublas$" in line.rest
    if line.op not in ("dot", "convolution") and not is_gemm:
        return 0.0
    sizes = [program.shapes_of(where, name) for name in line.operands[:2]]
    if len(sizes) < 2 or not all(sizes):
        return 0.0
    a, b, out = sizes[0][0].size, sizes[1][0].size, line.out[0].size
    # A matmul reads MK and KN and writes MN: the root of their product is MKN; with a
    # batch of n each is n times that, so the root is n^1.5 times MKN, and n MKN is due.
    batch = 1
    if dims := re.search(r'lhs_batch_dim\w*"?[=:][{\[]([\d,"]*)[}\]]', line.text):
        numbers = [int(n) for n in dims[1].replace('"', "").split(",") if n]
        for n in numbers:
            batch *= sizes[0][0].dims[n]
    for count in re.findall(r"(?:feature|batch)_group_count=(\d+)", line.rest):
        batch *= int(count)
    is_8bit = sizes[0][0].bytes == a and sizes[1][0].bytes == b
    return (few_bits if is_8bit else 1.0) * 2.0 * (a * b * out / batch) ** 0.5


def _arrays(
    program: Program, where: str, line: Instruction
) -> Iterator[tuple[Shape, float]]:
    """The arrays that an instruction reads and writes, and how many bytes of each."""
    inside = line.called[0] if line.op == "fusion" and line.called else ""
    if not inside:
        for name in line.operands:
            for shape in program.shapes_of(where, name)[:1]:
                yield shape, _read(program, where, name, [line])
        yield from zip(line.out[:1], [_written(program, where, line)], strict=False)
        return
    lines = program[inside]
    given = {
        int(line.rest.split(")")[0]): line.name
        for line in lines
        if line.op == "parameter"
    }
    for number, name in enumerate(line.operands):
        for shape in program.shapes_of(where, name)[:1]:
            yield shape, _read(program, inside, given.get(number, ""), lines)
    roots = [line for line in lines if line.is_root]
    if roots and roots[0].op == "tuple":
        by_name = program.by_name(inside)
        roots = [by_name[name] for name in roots[0].operands if name in by_name]
    for shape, root in zip(line.out, roots, strict=False):
        yield shape, _written(program, inside, root)


def _read(program: Program, where: str, name: str, lines: Sequence[Instruction]):
    """Bytes of `name` that `lines`, which are in computation `where`, need of it."""
    whole = sum(shape.bytes for shape in program.shapes_of(where, name))
    total = 0.0
    for user in lines:
        if name not in user.operands:
            continue
        is_first = user.operands[0] == name
        if user.op == "dynamic-slice" and is_first:
            total += sum(shape.bytes for shape in user.out)
        elif user.op == "bitcast":
            total += _read(program, where, user.name, lines)
        elif not (user.op == "dynamic-update-slice" and is_first):
            return whole
    return min(total, whole)


def _written(program: Program, where: str, line: Instruction) -> float:
    by_name = program.by_name(where)
    while line.op == "bitcast" and line.operands[0] in by_name:
        line = by_name[line.operands[0]]
    shapes = line.out
    if line.op == "dynamic-update-slice":
        shapes = program.shapes_of(where, line.operands[1])
    return sum(shape.bytes for shape in shapes)
