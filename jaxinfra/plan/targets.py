"""Hardware by name: `v5p:2x2x2`, `v6e:4x4`, `h100:1x8`; its figures with their sources.

Free of jax, so that a wrong name is refused at once.
"""

import dataclasses
import math
import re

from jaxinfra.config import ConfigError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device. hbm_bytes: what a program may use. peak_flops: dense bfloat16, a
    second; peak_8bit: fp8 and int8, where the compiler tells no cycles. link_bytes: on
    the wire a second and device, one way, all links together that a ring over one mesh
    axis can use; network_bytes: likewise from node to node or slice to slice;
    host_bytes: to its host's memory or from it. Of peak, attention_share
    is what the fused attention kernel reaches, forward and backward together, on a TPU
    an assumption; matmul_share what other matmuls do, where the compiler tells no
    cycles.
    """

    platform: str
    dims: int  # of a topology's name
    hbm_bytes: int
    hbm_bytes_per_sec: float
    peak_flops: float
    peak_8bit: float = 0.0
    link_bytes_per_sec: float
    network_bytes_per_sec: float
    host_bytes_per_sec: float
    clock_hz: float = 0.0  # of a TPU's core, by which the compiler's cycles are seconds
    attention_share: float = 0.5
    matmul_share: float = 1.0


# TPUs: cloud.google.com/tpu/docs system architecture pages (peak, HBM, interchip links;
# a ring over an axis uses two of a chip's links); HBM as the compiler has it, less what
# it keeps. Clocks: peak / (FLOP a cycle of the matrix units). Their way to the host is
# PCIe as "How to Scale Your Model" part 2 has it, not measured; their network is a
# pod's over its chips (same pages; v5p's from that book). GPU: NVIDIA H100 SXM
# data sheet (dense; NVLink 900 GB/s both ways), its network a DGX H100's (one port of
# 400 Gb/s a GPU). Its shares are measured on one H200, which has its units: FLOPs of a
# plan over seconds of their kernels in a step of 1.2 billion parameters
# (scripts/results/kernels_h200.json), matmuls of 16 bits 746 TFLOP/s, attention with
# heads of 64 342; alone with heads of 128 366 (device_h200.json, as its way to the
# host, 48 to 52 GB/s). Matmuls of 8 bits are taken to reach the same share.
CHIPS = {
    "v5p": Chip(
        platform="tpu",
        dims=3,
        hbm_bytes=int(95.74 * 2**30),
        hbm_bytes_per_sec=2.765e12,
        peak_flops=459e12,
        link_bytes_per_sec=2.7e11,
        network_bytes_per_sec=6.25e9,
        host_bytes_per_sec=1.6e10,
        clock_hz=1.75e9,
    ),
    "v5e": Chip(
        platform="tpu",
        dims=2,
        hbm_bytes=int(15.75 * 2**30),
        hbm_bytes_per_sec=8.1e11,
        peak_flops=197e12,
        link_bytes_per_sec=9e10,
        network_bytes_per_sec=3.125e9,
        host_bytes_per_sec=1.6e10,
        clock_hz=1.5e9,
    ),
    "v6e": Chip(
        platform="tpu",
        dims=2,
        hbm_bytes=int(31.25 * 2**30),
        hbm_bytes_per_sec=1.64e12,
        peak_flops=918e12,
        link_bytes_per_sec=1.8e11,
        network_bytes_per_sec=1.25e10,
        host_bytes_per_sec=3.2e10,
        clock_hz=1.75e9,
    ),
    "h100": Chip(
        platform="gpu",
        dims=2,
        hbm_bytes=int(79.1 * 2**30),
        hbm_bytes_per_sec=3.35e12,
        peak_flops=989.5e12,
        peak_8bit=1979e12,
        link_bytes_per_sec=4.5e11,
        network_bytes_per_sec=5e10,
        host_bytes_per_sec=5e10,
        attention_share=0.35,
        matmul_share=0.75,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A topology: `shape` is of chips, for GPUs nodes x GPUs a node. slices: of a TPU,
    so many of that shape, which a slower network joins."""

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def node(self) -> int:
        """GPUs that are one node, where a slower network joins several; else 0: the
        program of a TPU's slice says itself what leaves it."""
        is_many = self.chip.platform == "gpu" and self.shape[0] > 1
        return self.shape[1] if is_many else 0

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Of three dims, along which of a TPU's topology links join the ends: of v5p
        along all where each is a multiple of 4 chips; of v5e and v6e along one that is
        16 long. Source: cloud.google.com/tpu/docs, TPU v5p and v6e."""
        if self.chip.dims == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return *(size == 16 for size in self.shape), False


def of_slices(target: Target, slices: int) -> Target:
    """So many of a TPU's slices; of GPUs the name has the nodes."""
    is_tpu = target.chip.platform == "tpu"
    return dataclasses.replace(target, slices=slices) if is_tpu else target


def parse(name: str) -> Target:
    """The target called `name`; ConfigError says what names are like."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise ConfigError(
            f"--target {name!r}: there is no {kind!r}; use one of {', '.join(CHIPS)},"
            f" as in v5p:2x2x2, v6e:4x4 or h100:1x8{did_you_mean(kind, CHIPS)}"
        )
    dims = CHIPS[kind].dims
    sizes = [int(s) for s in shape.split("x") if re.fullmatch(r"[1-9]\d{0,4}", s)]
    if len(sizes) != dims or shape.count("x") != dims - 1:
        example = "x".join(["2"] * dims) if dims == 3 else "4x4"
        what = "nodes x GPUs a node" if kind == "h100" else f"{dims} dims of chips"
        example = "1x8" if kind == "h100" else example
        raise ConfigError(
            f"--target {name!r}: {shape!r} must be {what}, as in {kind}:{example}"
        )
    return Target(name=name, kind=kind, shape=tuple(sizes))
