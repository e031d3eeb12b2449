"""FLOPs of the matmuls of a compiled program, loops multiplied out and each branch
weighted by how often it is taken."""

import math
import re
from collections.abc import Mapping

_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (.*)")
_SHAPE = re.compile(r"\b\w+\[([\d,]*)\]")


def matmul_flops(program: str, shares: Mapping[str, float]) -> float:
    """Of one device. shares: scope -> part of the loop's turns in which the branch of a
    conditional of that `jax.named_scope` is taken; others count as their dearest
    branch, always taken."""
    return _Program(program, shares).flops("ENTRY")


class _Program:
    def __init__(self, text: str, shares: Mapping[str, float]):
        self.shares, self.bodies, self.known = shares, {}, {}
        name = ""
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" "):
                is_entry = line.startswith("ENTRY")
                name = (
                    line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
                )
                self.bodies[name] = []
                if is_entry:
                    self.bodies["ENTRY"] = self.bodies[name]
            elif line.startswith(" "):
                self.bodies[name].append(line.strip())

    def flops(self, name: str) -> float:
        if name not in self.known:
            self.known[name] = sum(
                self.of(line, name) for line in self.bodies.get(name, ())
            )
        return self.known[name]

    def of(self, line: str, computation: str) -> float:
        head = line.split(", metadata=")[0].split(", backend_config=")[0]
        match = _INSTRUCTION.match(head)
        if not match:
            return 0.0
        operation = re.search(r"\s([\w\-]+)\(", match[2])
        kind = operation[1] if operation else ""
        called = re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", head)
        match kind:
            case "dot" | "convolution":
                return self.of_matmul(head, match[2], computation)
            case "while":
                body, test = (
                    re.search(rf"{key}=%?([\w.\-]+)", line)[1]
                    for key in ("body", "condition")
                )
                return self.trips(line, test) * self.flops(body)
            case "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", line)
                names = (
                    [name.strip().lstrip("%") for name in listed[1].split(",")]
                    if listed
                    else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
                )
                scope = re.search(r'op_name="([^"]*)"', line)
                parts = scope[1].split("/") if scope else []
                share = next((self.shares[p] for p in parts if p in self.shares), 1.0)
                return share * max(map(self.flops, names))
            case "fusion" | "call" | "async-start":
                return sum(map(self.flops, called))
            case _:
                return 0.0

    def of_matmul(self, head: str, rest: str, computation: str) -> float:
        """A matmul reads MK and KN and writes MN: 2 MKN is twice the root of their
        product, but for a batch, which all three have."""
        a, b = re.findall(r"%([\w.\-]+)", rest[rest.index("(") :])[:2]
        sizes = [self.size(computation, name) for name in (a, b)]
        groups = math.prod(
            int(n) for n in re.findall(r"(?:feature|batch)_group_count=(\d+)", head)
        )
        return 2 * math.sqrt(_elements(rest) * math.prod(sizes) / groups)

    def size(self, computation: str, name: str) -> int:
        for line in self.bodies[computation]:
            match = _INSTRUCTION.match(line)
            if match and match[1] == name:
                return _elements(match[2])
        return 0

    def trips(self, line: str, test: str) -> int:
        if known := re.search(r"known_trip_count[^0-9]*(\d+)", line):
            return int(known[1])
        bounds = [
            int(n)
            for each in self.bodies[test]
            for n in re.findall(r"s32\[\][^ ]* constant\((\d+)\)", each)
        ]
        return max(bounds, default=1)


def _elements(text: str) -> int:
    shape = _SHAPE.search(text)
    return math.prod(int(n) for n in shape[1].split(",") if n) if shape else 0
