"""A plan: the figures of one step on one target, as JSON and as text."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxinfra import checks
from jaxinfra.config import Config
from jaxinfra.plan import analytic, cost
from jaxinfra.plan.analytic import Memory
from jaxinfra.plan.compilers import Compiled
from jaxinfra.plan.targets import Target

FORMULA = (
    "step_secs = compute + waiting for the link + attention kernels (and grouped"
    " matmuls, at a TPU's peak or the share of it that a GPU's others reach);"
    " mfu = model FLOPs / (step_secs x peak), hfu = hardware FLOPs / (step_secs x peak)"
)
SOURCES = (
    "model FLOPs 6 N + 6 L heads T a token: arXiv:2204.02311 appendix B, causal",
    "compute: the compiler's estimated cycles over the clock (TPU), or the longer of"
    " matmuls at a measured share of peak and bytes at the memory's rate for every"
    " kernel (GPU)",
    "waiting: the program played on one core, one link, the network between nodes and"
    " the way to the host's memory (jaxinfra/plan/cost.py)",
)


# Of an attention kernel whose name has the word, in H FLOPs for every query, head and
# key that it sees; others go forward: 4. Backward makes the scores again: 10, and 14 in
# two kernels, which both do and both make the gradient of the scores.
_BACKWARD = {"dkv": 10, "dq": 14 - 10, "bwd": 10, "backward": 10}
# The TPU's kernel, beside which another, "-metadata", arranges groups; a GPU's.
_GROUPED = ("ragged-dot", "mosaic_gpu")


_AGAIN = "recomputed"
# What a plan has from the compiled program alone.
_OF_A_PROGRAM = (
    "what of the peak are arguments and temporaries",
    "hardware FLOPs",
    "what is on the wire",
    "where the time goes",
    "time of the step",
)


class KernelFlops(NamedTuple):
    """Of all calls of a device in a step."""

    attention: float
    grouped: float


def kernel_flops(
    config: Config, num_devices: int, calls: Mapping[str, float]
) -> KernelFlops:
    """FLOPs of a device's calls of kernels, by their names: attention of the mean layer
    and of one microbatch, a part of it where context splits keys; grouped matmuls of
    tokens that are spread evenly.

    Source: arXiv:2205.14135 appendix B.
    """
    model, train = config.model, config.train
    sizes = checks.resolve_mesh(config, num_devices)
    seen = [min(layer.window or train.length, train.length) for layer in model.layers]
    keys = sum(s - s**2 / (2 * train.length) for s in seen) / len(seen)
    parts, way = sizes["context"], config.parallel.context
    rows = train.batch_size // train.microbatches
    tokens = rows * train.length / num_devices * sizes["pipeline"]
    widths = products = 0.0
    for name, count in calls.items():
        if name.startswith(_GROUPED):
            products += 0 if name.endswith("metadata") else count
        else:
            whole = _calls_of(way, parts, name, train.length)
            widths += count * _in_widths(name.lower()) / whole
    met = model.experts_per_token * model.width * model.expert_width
    return KernelFlops(
        attention=widths * tokens * model.num_heads * keys * model.head_width,
        grouped=products * 2 * tokens * met,
    )


def flops_again(config: Config, num_devices: int, played: cost.Cost) -> float:
    """FLOPs of a device, kernels' included, that the backward pass does once more."""
    again = sum(v for scope, v in played.flops.items() if pass_of(scope) == _AGAIN)
    calls: Counter = Counter()
    for (name, scope), count in played.calls.items():
        if pass_of(scope) == _AGAIN:
            calls[name] += count
    return again + sum(kernel_flops(config, num_devices, calls))


def _calls_of(way: str, parts: int, kernel: str, length: int) -> int:
    """In which attention of a layer meets all its keys (`parallel.context`)."""
    if parts == 1 or way == "ulysses":
        return 1
    if way == "ring":
        return parts
    if "splash" not in kernel:
        return 2 * parts + 1
    from jaxinfra.parallel import splash_parts  # loads Pallas

    return splash_parts.calls_of(length // parts, length)


def _in_widths(kernel: str) -> int:
    return next((n for word, n in _BACKWARD.items() if word in kernel), 4)


def plan(
    config: Config,
    target: Target,
    *,
    memory: Memory,
    compiled: Compiled,
    played: cost.Cost,
    model_flops: float,
    options: dict[str, str],
    versions: dict[str, str],
) -> dict[str, Any]:
    """All figures as one JSON object. memory: the analytic model's, for what the
    compiler does not split; model_flops: of one step on one device. compute.cycles:
    the compiler's estimate of compute_secs, None for a GPU, whose compiler has none."""
    chip = target.chip
    flops = kernel_flops(config, target.num_devices, played.kernels)
    paid = kernel_flops(config, target.num_devices, played.paid_kernels)
    attention_secs = paid.attention / (chip.attention_share * chip.peak_flops)
    grouped_secs = paid.grouped / (chip.matmul_share * chip.peak_flops)
    kernel_secs = attention_secs + grouped_secs
    hardware_flops = played.matmul_flops + sum(flops)
    again_flops = flops_again(config, target.num_devices, played)
    step_secs = played.secs + kernel_secs
    tokens = config.train.batch_size * config.train.length
    peak = chip.peak_flops * step_secs
    return _asked(config, target) | {
        "memory": _by_arithmetic(memory)
        | {
            "arguments_bytes": compiled.arguments_bytes,
            "temporary_bytes": compiled.temporary_bytes,
            "peak_bytes": compiled.peak_bytes,
            "hbm_bytes": chip.hbm_bytes,
            "headroom_bytes": chip.hbm_bytes - compiled.peak_bytes,
            "analytic_peak_bytes": memory.peak_bytes,
        },
        "compute": {
            "model_flops": model_flops,
            "hardware_flops": hardware_flops,
            "matmul_flops": played.matmul_flops,
            "kernel_flops": sum(flops),
            "remat_flops": again_flops,
            "remat_frac": again_flops / hardware_flops,
            "other_frac": 1 - (model_flops + again_flops) / hardware_flops,
            "kernel_calls": played.kernels,
            "cycles": round(played.compute_secs * chip.clock_hz) or None,
            "compute_secs": played.compute_secs,
            "waiting_secs": played.waiting_secs,
            "kernel_secs": kernel_secs,
            "scopes": dict(by_scope(played.scopes).most_common()),
            "unknown_loops": played.unknown_loops,
        },
        "wire": [
            {
                "kind": kind,
                "axes": axes,
                "how": how,
                "bytes": sent,
                "waited_secs": played.waited.get((kind, axes, how), 0.0),
            }
            for (kind, axes, how), sent in played.sent.items()
        ],
        "step_secs": step_secs,
        "tokens_per_sec": tokens / step_secs,
        "mfu": model_flops / peak,
        "hfu": hardware_flops / peak,
        "formula": FORMULA,
        "sources": [*SOURCES],
        "compile_secs": compiled.secs,
        "compiler_options": options,
        "versions": versions,
    }


def analytic_plan(config: Config, target: Target, memory: Memory) -> dict[str, Any]:
    """What is known without compiling."""
    return _asked(config, target) | {
        "memory": dataclasses.asdict(memory)
        | {"peak_bytes": memory.peak_bytes, "headroom_bytes": memory.headroom_bytes},
    }


def _by_arithmetic(memory: Memory) -> dict[str, int]:
    return {
        "parameters_bytes": memory.parameters_bytes,
        "optimizer_bytes": memory.optimizer_bytes,
        "gradients_bytes": memory.gradients_bytes,
        "activations_bytes": memory.activations_bytes,
    }


def refused_plan(
    config: Config,
    target: Target,
    peak_bytes: int,
    *,
    memory: Memory,
    model_flops: float,
    options: dict[str, str],
    versions: dict[str, str],
) -> dict[str, Any]:
    """What is known of a step that the compiler refused, since it would use
    `peak_bytes` of a device: the same keys as `plan`, without those of a program."""
    hbm_bytes = target.chip.hbm_bytes
    return _asked(config, target) | {
        "memory": _by_arithmetic(memory)
        | {
            "peak_bytes": peak_bytes,
            "hbm_bytes": hbm_bytes,
            "headroom_bytes": hbm_bytes - peak_bytes,
            "analytic_arguments_bytes": memory.arguments_bytes,
            "analytic_temporary_bytes": memory.temporary_bytes,
            "analytic_peak_bytes": memory.peak_bytes,
        },
        "compute": {"model_flops": model_flops},
        "refused": (
            f"the step needs {_size(peak_bytes)} of each {target.kind}, which has"
            f" {_size(hbm_bytes)}, and a compiler takes only what fits; keep less"
            f" (train.remat, now {config.train.remat}), take fewer rows at a time"
            f" (train.microbatches, now {config.train.microbatches}, or a smaller"
            " train.batch_size) or split more (mesh.fsdp, mesh.tensor, mesh.pipeline)"
        ),
        "missing": [*_OF_A_PROGRAM],
        "compiler_options": options,
        "versions": versions,
    }


def text(found: dict[str, Any]) -> str:
    """The plan for a reader."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items())
    lines = [
        f"{found['config']} on {found['target']}: {found['devices']} devices"
        f" ({mesh or 'one'}), {found['batch_size']} rows of {found['length']} tokens,"
        f" {found['precision']}, remat {found['remat']}",
        "",
        "memory of a device",
    ]
    memory = found["memory"]
    lines += [
        f"  {name.removesuffix('_bytes').replace('_', ' '):<20}{_size(size):>12}"
        for name, size in memory.items()
    ]
    if memory["headroom_bytes"] < 0:
        lines.append("  does not fit: more fsdp or tensor, fewer rows, or train.remat")
    if found["limits"]:
        lines.append(f"  limits: {'; '.join(found['limits'])}")
    if "compute" not in found:
        return "\n".join(lines)
    compute = found["compute"]
    if "refused" in found:
        lines += [
            "",
            f"work of a device: model {compute['model_flops'] / 1e12:.3g} TFLOP",
            "the compiler refused the program, so there is no word of: "
            + ", ".join(found["missing"]),
        ]
        return "\n".join(lines)
    lines += [
        "",
        f"work of a device: model {compute['model_flops'] / 1e12:.3g} TFLOP, hardware"
        f" {compute['hardware_flops'] / 1e12:.3g} ({compute['remat_frac']:.0%} of it"
        f" again, {max(0.0, compute['other_frac']):.0%} padding and other)",
        "",
        "on the wire of a device           over            how         sent  waited ms",
    ]
    for w in found["wire"]:
        lines.append(
            f"  {w['kind']:<30}  {w['axes']:<15} {w['how']:<5} {_size(w['bytes']):>9}"
            f"  {w['waited_secs'] * 1e3:9.2f}"
        )
    cycles = compute["cycles"]
    told = f" ({cycles:,} cycles by the compiler's estimate)" if cycles else ""
    lines += ["", f"where the core's time goes, ms{told}"]
    lines += [f"  {k:<36}{v * 1e3:9.2f}" for k, v in compute["scopes"].items()]
    lines += [
        "",
        f"step {found['step_secs']:.3f} s = compute {compute['compute_secs']:.3f}"
        f" + waiting {compute['waiting_secs']:.3f} + kernels"
        f" {compute['kernel_secs']:.3f}",
        f"{found['tokens_per_sec']:,.0f} tokens/s, MFU {found['mfu']:.1%},"
        f" HFU {found['hfu']:.1%}; compiled in {found['compile_secs']:.0f} s",
        FORMULA,
        *SOURCES,
    ]
    return "\n".join(lines)


def by_scope(scopes: dict[str, float]) -> Counter:
    """Seconds by pass and named scope, as in "backward ffn matmul"."""
    named = ("embed", "attention", "ffn", "unembed", "loss", "update")
    total: Counter = Counter()
    for scope, secs in scopes.items():
        parts = _parts(scope)
        part = next((name for name in named if name in parts), "rest of the step")
        what = "matmul" if "dot_general" in parts else "other"
        total[" ".join(filter(None, (pass_of(scope), part, what)))] += secs
    return total


def pass_of(scope: str) -> str:
    """One of "forward", "backward" and "recomputed", or "" of what is of no pass.

    A pipeline's stage runs layers again under "backward" or "weight", each derived
    (jvp) as in its forward pass; what else stands there, as sums of gradients, is the
    pass's own.
    """
    parts = {*_parts(scope)}
    in_a_stage = parts & {"backward", "weight"}
    if "rematted_computation" in parts:
        return _AGAIN
    if "transpose" in parts:
        return "backward"
    if in_a_stage:
        return _AGAIN if "jvp" in parts else "backward"
    return "forward" if parts & {"jvp", "forward"} else ""


def _parts(scope: str) -> list[str]:
    return scope.replace("(", "/").replace(")", "/").split("/")


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.2f} kB"


def _asked(config: Config, target: Target) -> dict[str, Any]:
    """What the plan is of."""
    sizes = checks.resolve_mesh(config, target.num_devices)
    return {
        "config": config.name,
        "target": target.name,
        "devices": target.num_devices,
        "mesh": {k: v for k, v in sizes.items() if v > 1},
        "remat": config.train.remat,
        "batch_size": config.train.batch_size,
        "length": config.train.length,
        "precision": config.precision,
        "limits": analytic.limits(config),
    }
