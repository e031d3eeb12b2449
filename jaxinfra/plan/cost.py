"""What a compiled, scheduled program costs a device: it is played on one core, one
link, the network between nodes or slices if there is one, and the way to the host's
memory.

The core runs a computation's instructions in the order in which they are scheduled,
each for its time (`Clock`). The link carries one collective at a time, the network
another, the way to the host one copy, either way. Devices of a node that are in one
group share what it sends to other nodes. A synchronous
collective stops the core until it is through, an asynchronous one only where its result
is awaited too early. A loop costs its trip count times one turn, drained at the turn's
end; a conditional the mean of its branches by the shares that the caller gives, one
for time and one for work, else its dearest. Pallas and fused attention kernels carry no
time and are counted by name: `report.plan` adds it.

Limits: a model of order, not of time. One link for all mesh axes, free while a
collective goes from node to node; a collective whose groups could not be read is taken
to stay within nodes; no latency, no contention of memory between a collective and the
core; host memory at one rate for all devices that share it.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxinfra.plan import wires, work
from jaxinfra.plan.program import COLLECTIVES, Instruction, Program, trip_count
from jaxinfra.plan.wires import Wire


class Share(NamedTuple):
    """How often each branch of a conditional is taken, in their order (lax.cond: false,
    true). secs: the part of the turns in which some device takes it, so that all wait;
    work: the part in which the mean device does."""

    secs: Sequence[float]
    work: Sequence[float]


# Pattern -> share of the conditionals that stand directly in a scope that ends so.
Shares = Mapping[str, Share]
Clock = Callable[[Program, str, Instruction], float]  # seconds of one instruction
# Totals that are time or become it: of a branch `Share.secs` of them count.
_TIMED = ("scope", "waited", "paid")


@dataclasses.dataclass(frozen=True)
class Cost:
    """One run of a program on one device.

    secs = compute_secs + waiting_secs. flops: jax scope -> 2MKN over every matmul
    outside kernels. sent: (kind, mesh axes, "async" or "sync") -> bytes on the wire; of
    kind "copy" over "host" what goes to the host's memory or comes from it. waited: by
    the same, the seconds that the core waits there; its sum is waiting_secs. calls:
    (name, scope) -> calls of kernels; paid_kernels: by name, those for whose time all
    devices wait, more than these where devices take a branch by turns. scopes: jax
    scope -> seconds of compute. unknown_loops: loops whose trip count could not be
    read, taken as one turn.
    """

    compute_secs: float
    waiting_secs: float
    flops: dict[str, float]
    sent: dict[tuple[str, str, str], float]
    waited: dict[tuple[str, str, str], float]
    calls: dict[tuple[str, str], float]
    paid_kernels: dict[str, float]
    scopes: dict[str, float]
    unknown_loops: int

    @property
    def secs(self) -> float:
        return self.compute_secs + self.waiting_secs

    @property
    def matmul_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def kernels(self) -> dict[str, float]:
        """Calls by name."""
        total: Counter = Counter()
        for (name, _), calls in self.calls.items():
            total[name] += calls
        return dict(total)


def cycles_at(clock_hz: float) -> Clock:
    """A TPU's clock: the compiler's own estimated cycles."""
    return lambda program, where, line: line.cycles / clock_hz


def roofline(peak_flops: float, bytes_per_sec: float, peak_8bit: float = 0) -> Clock:
    """A clock where the compiler tells no time: of each kernel the longer of its
    matmuls at `peak_flops` (of 8-bit operands `peak_8bit`, unless that is 0) and of
    what it reads and writes at `bytes_per_sec`."""
    few_bits = peak_flops / peak_8bit if peak_8bit else 1.0
    silent = (
        "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while",
        "conditional", "call", "after-all",
    )  # fmt: skip

    def secs(program: Program, where: str, line: Instruction) -> float:
        if line.op in silent or line.op.removesuffix("-start") in COLLECTIVES:
            return 0.0
        if line.op.endswith(("-start", "-done", "-update")):
            return 0.0
        flops = work.matmul_flops(program, where, line, few_bits=few_bits)
        moved = work.moved_bytes(program, where, line)
        return max(flops / peak_flops, moved / bytes_per_sec)

    return secs


def play(
    program: Program,
    *,
    clock: Clock,
    link_bytes_per_sec: float,
    network_bytes_per_sec: float = math.inf,
    host_bytes_per_sec: float = math.inf,
    axes: wires.Axes | None = None,
    node: int = 0,
    shares: Shares | None = None,
) -> Cost:
    """The cost of one run; `axes` tells which mesh axes a collective's groups span,
    `node` how many devices are one, if a network joins several."""
    rates = {
        "link": link_bytes_per_sec,
        "network": network_bytes_per_sec,
        wires.HOST: host_bytes_per_sec,
    }
    player = _Player(program, clock, rates, axes, node, shares or {})
    secs, totals = player.play(program.entry)
    compute = sum(v for (what, *_), v in totals.items() if what == "scope")

    def of(what: str) -> dict:
        keys = {k: v for k, v in totals.items() if k[0] == what and v}
        return {k[1] if len(k) == 2 else k[1:]: v for k, v in sorted(keys.items())}

    return Cost(
        compute_secs=compute,
        waiting_secs=max(0.0, secs - compute),  # rounding may leave -1e-18
        flops=of("flops"),
        sent=of("sent"),
        waited=of("waited"),
        calls=of("kernel"),
        paid_kernels=of("paid"),
        scopes=of("scope"),
        unknown_loops=player.unknown_loops,
    )


class _Player:
    """Core and ways out of one device; the totals of each computation are kept."""

    def __init__(self, program, clock, rates, axes, node, shares):
        self.program, self.clock, self.rates = program, clock, rates
        self.axes, self.node, self.shares, self.played = axes, node, shares, {}
        self.unknown_loops = 0

    def play(self, where: str) -> tuple[float, Counter]:
        """(seconds, totals) of one run of a computation, its collectives drained."""
        if where not in self.played:
            turn = _Turn(self, where)
            for line in self.program[where]:
                turn.run(line)
            for way, free in turn.free.items():
                turn.wait(free, *turn.last.get(way, (None,)))
            self.played[where] = turn.core, turn.totals
        return self.played[where]


class _Turn:
    """One run of one computation. core, free: when the core, and each way, are done
    with what they have; last: what that is; due: of what is under way, when it ends,
    and what it is."""

    def __init__(self, player: _Player, where: str):
        self.player, self.where, self.program = player, where, player.program
        self.core, self.free = 0.0, dict.fromkeys(player.rates, 0.0)
        self.totals: Counter = Counter()
        self.due: dict[str, tuple[float, Wire | None]] = {}
        self.held: dict[str, list[Wire]] = {}
        self.last: dict[str, tuple[Wire, str]] = {}

    def wait(self, until: float, wire: Wire | None, how: str = "async") -> None:
        if until > self.core and wire is not None:
            self.totals["waited", wire.kind, wire.axes, how] += until - self.core
        self.core = max(self.core, until)

    def send(self, wire: Wire, key: str | None = None) -> None:
        """Puts a collective on the link, or a copy on its way to the host; without a
        `key` the core waits for it."""
        way = "network" if wire.near else "link"
        way = wires.HOST if wire.axes == wires.HOST else way
        taken = wire.bytes / self.player.rates[way]
        if wire.near:
            within_node = wire.bytes / self.player.rates["link"]
            taken = max(taken / wire.near, within_node)
        self.free[way] = max(self.free[way], self.core) + taken
        how = "sync" if key is None else "async"
        self.last[way] = wire, how
        self.totals["sent", wire.kind, wire.axes, how] += wire.bytes
        if key is None:
            self.wait(self.free[way], wire, how)
        else:
            self.due[key] = self.free[way], wire

    def add(self, totals: Counter, times: float = 1.0, done: float = 1.0) -> None:
        """`times` the totals that are time, `done` times those that are work."""
        for key, value in totals.items():
            self.totals[key] += value * (times if key[0] in _TIMED else done)

    def wires(self, computation: str) -> list[Wire]:
        player = self.player
        return wires.within(self.program, computation, player.axes, player.node)

    def run(self, line: Instruction) -> None:
        secs = self.player.clock(self.program, self.where, line)
        if secs:
            self.core += secs
            self.totals["scope", line.scope] += secs
        for scope, flops in work.matmuls(self.program, self.where, line):
            self.totals["flops", scope] += flops
        if copied := work.host_bytes(self.program, self.where, line):
            key = line.name if line.op.endswith("-start") else None
            self.send(Wire("copy", wires.HOST, copied), key)
            return
        operand = (line.operands or [""])[0]
        kind = line.op.removesuffix("-start")
        match line.op:
            case _ if kind in COLLECTIVES:
                on = self.player.axes, self.player.node
                wire = wires.of(line, self.where, *on, program=self.program)
                self.send(wire, line.name if line.op.endswith("-start") else None)
            case "send" if wire := wires.between_slices(line):
                self.send(wire, line.name)
            case "async-start":
                self.due[line.name] = 0.0, None
                for name in line.called:
                    for wire in self.wires(name):
                        self.send(wire, line.name)
            case "custom-call-start":  # it begins with the operands of its update
                self.due[line.name] = 0.0, None
                self.held[line.name] = [w for c in line.called for w in self.wires(c)]
            case "custom-call-update":
                self.due[line.name] = 0.0, None
                for wire in self.held.pop(operand, []):
                    self.send(wire, line.name)
            case "async-update":
                self.due[line.name] = self.due.get(operand, (0.0, None))
            case _ if line.op.endswith("-done"):
                self.wait(*self.due.pop(operand, (0.0, None)))
            case "custom-call" if wires.is_kernel(line):
                self.totals["kernel", wires.kernel_name(line), line.scope] += 1
                self.totals["paid", wires.kernel_name(line)] += 1
            case "while":
                self._loop(line)
            case "conditional":
                self._branch(line)
            case "call":
                for name in line.called:
                    secs, totals = self.player.play(name)
                    self.core += secs
                    self.add(totals)
            case "fusion":
                self._fusion(line)

    def _loop(self, line: Instruction) -> None:
        turns = trip_count(self.program, line)
        if turns is None:
            self.player.unknown_loops += 1
            turns = 1
        secs, totals = self.player.play(line.computation("body"))
        self.core += turns * secs
        self.free = {way: max(free, self.core) for way, free in self.free.items()}
        self.add(totals, turns, turns)

    def _branch(self, line: Instruction) -> None:
        branches = re.findall(r"(?:false|true)_computation=%?([\w.\-]+)", line.rest)
        if "true_computation" in line.rest:  # printed true first
            branches = [line.computation(f"{b}_computation") for b in ("false", "true")]
        for listed in re.findall(r"branch_computations=\{([^}]*)\}", line.rest):
            branches += [name.strip().lstrip("%") for name in listed.split(",")]
        played = [self.player.play(name) for name in branches]
        around = line.scope.rpartition("/")[0]
        shares = self.player.shares.items()
        given = [share for end, share in shares if re.search(f"(?:{end})$", around)]
        if given and len(given[0].secs) == len(played):
            share = given[0]
        else:
            dearest = max(range(len(played)), key=lambda i: played[i][0], default=0)
            parts = [float(i == dearest) for i in range(len(played))]
            share = Share(parts, parts)
        for part, done, (secs, totals) in zip(*share, played, strict=True):
            self.core += part * secs
            self.add(totals, part, done)

    def _fusion(self, line: Instruction) -> None:
        """A fusion may start, carry on or end an asynchronous collective, or be one."""
        if line.name.startswith("async-collective-done"):
            for name in line.called:
                for channel in wires.channels(self.program, name):
                    self.wait(*self.due.pop(channel, (0.0, None)))
        elif line.name.startswith("async-collective-start"):
            for name in line.called:
                found = wires.channels(self.program, name)
                for channel, wire in zip(found, self.wires(name), strict=False):
                    self.send(wire, channel)
        elif not any(name.startswith("async_collective") for name in line.called):
            for name in line.called:
                for wire in self.wires(name):
                    self.send(wire)
