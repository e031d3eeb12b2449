"""A compiled program's own text as records: computations of instructions.

XLA prints one instruction a line: `%name = type op(operands), attributes,
metadata={..}, backend_config={..}`. Of these `parse` keeps what a cost needs; the rest
stays in `text`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1,
    "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
    "u64": 8, "f64": 8,
}  # fmt: skip
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip

_SHAPE = re.compile(
    r"\b(pred|[suf]\d+|bf16|f8e4m3fn|f8e5m2)\[([\d,]*)\](\{[^{}]*S\(5\)[^{}]*\})?"
)
_LINE = re.compile(r"(ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)", re.DOTALL)
_CALLED = re.compile(r"(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d{1,15})"')
_COMMENT = re.compile(r"/\*.*?\*/")


class Shape(NamedTuple):
    """dtype as XLA spells it, dims, and whether it lies in the host's memory."""

    dtype: str
    dims: tuple[int, ...]
    is_host: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * BYTES.get(self.dtype, 4)


class Instruction(NamedTuple):
    """One line. out: the shapes of its result, flat. rest: operands and attributes,
    without metadata. cycles: the TPU compiler's estimate, 0 where it gives none. scope:
    op_name, the way of jax's named scopes to it."""

    name: str
    op: str
    out: tuple[Shape, ...]
    rest: str
    text: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    @property
    def called(self) -> list[str]:
        return _CALLED.findall(self.rest)

    @property
    def cycles(self) -> float:
        found = _CYCLES.search(self.text)
        return float(found[1]) if found else 0.0

    @property
    def scope(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def channel(self) -> str:
        found = re.search(r"channel_id=(\d+)", self.rest)
        return found[1] if found else self.name

    def computation(self, key: str) -> str:
        """The name that attribute `key` gives, as in body=%name."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        if not found:
            raise ValueError(f"{self.name}: no {key} in {self.rest[:200]!r}")
        return found[1]


class Program:
    """Computations by name. `shapes_of(computation, name)`: of an instruction there."""

    def __init__(self, computations: Mapping[str, list[Instruction]], entry: str):
        self.computations, self.entry = computations, entry
        self._by_name: dict[str, dict[str, Instruction]] = {}

    def __getitem__(self, computation: str) -> list[Instruction]:
        return self.computations.get(computation, [])

    def by_name(self, computation: str) -> dict[str, Instruction]:
        if computation not in self._by_name:
            lines = {line.name: line for line in self[computation]}
            self._by_name[computation] = lines
        return self._by_name[computation]

    def shapes_of(self, computation: str, name: str) -> tuple[Shape, ...]:
        line = self.by_name(computation).get(name)
        return line.out if line else ()


def parse(text: str) -> Program:
    """The program of a scheduled HLO module's text, `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    now, entry = None, ""
    for line in _joined(text):
        if not line.startswith(" ") and line.rstrip().endswith("{"):
            head = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            if head is None:
                continue
            now = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif _is_end(line):
            now = None
        elif now is not None and (instruction := _instruction(line)):
            now.append(instruction)
    if not entry:
        raise ValueError("the text has no ENTRY computation; is it a compiled module?")
    return Program(computations, entry)


def shapes(text: str) -> tuple[Shape, ...]:
    """All array shapes in a type."""
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), bool(host))
        for dtype, dims, host in _SHAPE.findall(text)
    )


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often a `while` turns: as the compiler says, or its bound over its step; None
    if neither can be read."""
    if said := re.search(r"known_trip_count[^0-9]*(\d+)", loop.text):
        return int(said[1])
    bound = index = None
    for line in program[loop.computation("condition")]:
        if line.op == "constant" and _is_counter(line):
            bound = _constant(line)
        elif line.op == "get-tuple-element" and _is_counter(line):
            index = int(line.rest.rpartition("index=")[2].split(",")[0])
    if bound is None or index is None:
        return None
    body = program.by_name(loop.computation("body"))
    root = next((line for line in body.values() if line.is_root), None)
    operands = root.operands if root and root.op == "tuple" else []
    name = operands[index] if index < len(operands) else ""
    while name in body and body[name].op == "copy":
        name = body[name].operands[0]
    added = body[name].operands if name in body and body[name].op == "add" else []
    steps = [
        _constant(body[n]) for n in added if n in body and body[n].op == "constant"
    ]
    return bound // max(steps or [1])  # loops of a windowed matmul step by two


def _joined(text: str) -> Iterator[str]:
    """Lines, those that a line break inside an attribute has cut put together."""
    held = ""
    for line in text.splitlines():
        is_new = line.startswith(("  %", "  ROOT ", "%", "ENTRY ", "HloModule"))
        if is_new or _is_end(line) or not held or line.endswith("{"):
            if held:
                yield held
            held = line
        else:
            held += line
    if held:
        yield held


def _is_end(line: str) -> bool:
    return line.rstrip() == "}" or line.startswith("}, execution_thread")


def _instruction(line: str) -> Instruction | None:
    head = line.strip().split(", metadata=")[0].split(", backend_config=")[0]
    found = _LINE.match(_COMMENT.sub("", head))
    if not found:
        return None
    root, name, out, op, rest = found.groups()
    return Instruction(name, op, shapes(out), rest, line, bool(root))


def _is_counter(line: Instruction) -> bool:
    return (
        len(line.out) == 1 and line.out[0].dims == () and line.out[0].dtype[0] in "su"
    )


def _constant(line: Instruction) -> int:
    return int(line.rest.split(")")[0])
