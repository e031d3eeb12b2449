"""The analytic memory model against the TPUs' compilers, at points drawn by a seed.

    python scripts/memory_points.py [--count 40] [--seed 2] [--secs N]

Needs the extra `tpu`. A point is a dense model, a mesh, a topology and a remat policy,
all drawn; its layers are as many as put its memory, as the model has it, at a drawn
part (0.75 to 1.25) of what the chip has, so that about half of them do not fit. The
step is compiled with the options of its target, but without the wide VMEM and at XLA's
optimization level 1: these take most of a compiler's time, and less than 1% of memory
where both were tried. One that does not fit is refused, with the bytes that it would
use. Points that results/memory.json has are not compiled again. Writes it, and
memory.md for readers. The model was mended by the points of seed 1; those of seed 2
were drawn after that, and are the ones that are kept.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import numpy as np

from jaxinfra.config import ConfigError
from jaxinfra.plan import compilers, targets

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"
TOPOLOGIES = ("v5e:2x2", "v5e:2x4", "v5e:2x4", "v5e:4x4", "v6e:2x4", "v5p:2x2x1")
REMATS = ("full", "full", "dots", "none", "save:attention", "save:query+ffn_in")
MOST_LAYERS = 400


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--secs", type=float, default=1e9, help="start no point after")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "memory.json")
    args = parser.parse_args(argv)
    compilers.prepare_process(targets.parse(TOPOLOGIES[0]))
    points = json.loads(args.out.read_text())["points"] if args.out.exists() else {}
    began = time.monotonic()
    for number in range(args.count):
        name = f"{args.seed}/{number}"
        if name in points or time.monotonic() - began > args.secs:
            continue
        words, target_name = drawn(args.seed, number)
        points[name] = {"target": target_name, "options": " ".join(words)}
        points[name] |= measured(words, target_name)
        print(name, points[name], flush=True)
        told = {"summary": summary(points), "points": points}
        args.out.write_text(json.dumps(told, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(points))
    print(json.dumps(summary(points), indent=1))
    return 0


def drawn(seed: int, number: int) -> tuple[list[str], str]:
    """(options of train.py, target) of one point."""
    attempt = 0
    while True:
        rng = np.random.default_rng([seed, number, attempt])
        found = _draw(rng)
        if found is not None:
            return found
        attempt += 1


def _draw(rng: np.random.Generator) -> tuple[list[str], str] | None:
    """A point; None where no number of layers gives it the memory that was drawn."""
    pick = lambda values: values[rng.integers(len(values))]
    target = targets.parse(pick(TOPOLOGIES))
    width = int(pick((512, 1024, 1536, 2048)))
    heads = width // 128
    keys = pick([k for k in (heads // 4, heads // 2, heads) if heads % k == 0])
    ways = {
        4: ((1, 4, 1), (2, 2, 1), (1, 2, 2)),
        8: ((1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2)),
        16: ((1, 16, 1), (2, 8, 1), (1, 8, 2), (1, 4, 4)),
    }
    data, fsdp, tensor = pick(ways[target.num_devices])
    if keys % tensor:
        return None
    rows, microbatches = int(pick((1, 2, 4))), int(pick((1, 1, 1, 2)))
    options = {
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "mesh.tensor": tensor,
        "train.batch_size": rows * microbatches * data * fsdp,
        "train.microbatches": microbatches,
        "train.length": pick((1024, 2048, 4096, 8192)),
        "train.remat": pick(REMATS),
        "model.width": width,
        "model.ffn_width": int(width * pick((2.5, 3, 3.5, 4))) // 512 * 512,
        "model.num_heads": heads,
        "model.num_kv_heads": keys,
        "model.vocab_size": pick((32_000, 50_304, 128_256)),
        "model.activation": pick(("swiglu", "swiglu", "gelu")),
        "model.tied": pick(("true", "false")),
        "runtime.compiler_options": "xla_tpu_scoped_vmem_limit_kib=",
    }
    share = rng.uniform(0.75, 1.25)

    def words(layers: int) -> list[str]:
        every = {"config": "llama3_8b"} | options | {"model.repeats": layers}
        return [w for key, value in every.items() for w in (f"--{key}", str(value))]

    def used(layers: int) -> float:
        return analytic_bytes(words(layers), target) / target.chip.hbm_bytes

    low, high = 1, MOST_LAYERS
    if not used(low) <= share <= used(high):
        return None
    while high - low > 1:  # the last number of layers that is within the share
        middle = (low + high) // 2
        low, high = (middle, high) if used(middle) <= share else (low, middle)
    return (words(low), target.name) if low > 1 else None


def analytic_bytes(words: list[str], target: targets.Target) -> int:
    from jaxinfra.plan import analytic

    config = _config(words, target)
    return analytic.memory(config, target.num_devices, target.chip.hbm_bytes).peak_bytes


def _config(words: list[str], target: targets.Target) -> Any:
    from jaxinfra import options

    devices = ["--runtime.devices", str(target.num_devices)]
    return options.read_command([*words, *devices])[0]


def measured(words: list[str], target_name: str) -> dict[str, Any]:
    """Both peaks, and whether the step fits: by arithmetic and by the compiler."""
    import jax

    from jaxinfra.plan import analytic, step

    jax.config.update("jax_optimization_level", "O1")
    target = targets.parse(target_name)
    config, hbm = _config(words, target), target.chip.hbm_bytes
    memory = analytic.memory(config, target.num_devices, hbm)
    began = time.monotonic()
    try:
        found, compiled = step.plan_step(config, target)
    except (ConfigError, jax.errors.JaxRuntimeError) as error:
        return {"failed": str(error)[:300]}
    peak = found["memory"]["peak_bytes"]
    return {
        "analytic_gb": round(memory.peak_bytes / 1e9, 3),
        "compiled_gb": round(peak / 1e9, 3),
        "hbm_gb": round(hbm / 1e9, 3),
        "arguments_gb": round(memory.arguments_bytes / 1e9, 3),
        "analytic_fits": memory.peak_bytes <= hbm,
        "fits": compiled is not None,
        "secs": round(time.monotonic() - began, 1),
    }


def summary(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
    good = [p for p in points.values() if "failed" not in p]
    if not good:
        return {"points": 0}
    errors = [abs(p["analytic_gb"] / p["compiled_gb"] - 1) for p in good]
    return {
        "points": len(good),
        "failed": len(points) - len(good),
        "same_verdict": sum(p["fits"] == p["analytic_fits"] for p in good),
        "do_not_fit": sum(not p["fits"] for p in good),
        "median_error": round(statistics.median(errors), 4),
        "largest_error": round(max(errors), 4),
    }


def table(points: dict[str, dict[str, Any]]) -> str:
    """The points as Markdown."""
    told = summary(points)
    lines = [
        "# Memory by arithmetic, against the TPUs' compilers",
        "",
        "Made by `scripts/memory_points.py`: models, meshes and topologies drawn by a",
        "seed around the limit of the chip's memory.",
        "",
        "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in told.items()),
        "",
        "| point | target | mesh, rows x tokens | model | remat | by arithmetic, GB |"
        " compiler, GB | error | of the chip's | fits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, p in points.items():
        words = p["options"].split()
        o = {k.removeprefix("--"): v for k, v in zip(words[::2], words[1::2])}
        axes = [a for a in ("data", "fsdp", "tensor") if o[f"mesh.{a}"] != "1"]
        mesh = " x ".join(f"{a} {o[f'mesh.{a}']}" for a in axes)
        shape = f"{o['train.batch_size']} x {o['train.length']}"
        many = int(o["train.microbatches"])
        shape += f" in {many}" if many > 1 else ""
        model = (
            f"{o['model.repeats']} x {o['model.width']}, ffn {o['model.ffn_width']}"
            f" {o['model.activation']}, heads {o['model.num_heads']} /"
            f" {o['model.num_kv_heads']}, vocabulary {o['model.vocab_size']}"
            + (" tied" if o["model.tied"] == "true" else "")
        )
        start = f"| {name} | {p['target']} | {mesh}, {shape} | {model} "
        if "failed" in p:
            lines.append(f"{start}| {o['train.remat']} | failed: {p['failed'][:80]} |")
            continue
        error = p["analytic_gb"] / p["compiled_gb"] - 1
        verdict = "yes" if p["fits"] else "no"
        verdict += "" if p["fits"] == p["analytic_fits"] else " (arithmetic: not so)"
        lines.append(
            f"{start}| {o['train.remat']} | {p['analytic_gb']:.2f} |"
            f" {p['compiled_gb']:.2f} | {error:+.1%} | {p['hbm_gb']:.1f} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
