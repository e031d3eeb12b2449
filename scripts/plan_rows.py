"""The plans of shipped configs on hardware that is not here, kept as one table.

    python scripts/plan_rows.py [--rows NAME NAME] [--secs N] [--again] [--quick]

Each row is one command of scripts/plan.py, compiled by the target's own compiler where
this Python has it (extra `tpu` or `cuda`; other rows wait for a Python that has). A row
that results/plan.json has is not compiled again without --again, so the table may be
made in pieces. --quick takes a TPU's row at XLA's optimization level 1 and without the
wide VMEM, a fifth of the work: memory and what travels are within 1%, and as products
are badly tiled there is no time in the row. Writes results/plan.json and, for readers,
results/plan.md.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

from jaxinfra.config import ConfigError
from jaxinfra.plan import compilers, targets

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"

# What --quick does not tell.
_TIMES = (
    "price_secs", "compute_secs", "waiting_secs", "kernel_secs", "step_secs",
    "tokens_per_sec", "mfu", "hfu", "waited_ms", "scopes_ms",
)  # fmt: skip
_LESS_VMEM = "xla_tpu_scoped_vmem_limit_kib="
_8B = "--config llama3_8b --train.batch_size 16"
_V5P8 = f"{_8B} --target v5p:2x2x2"
_128K = (
    "--config llama3_8b --train.batch_size 2 --train.length 131072 --mesh.fsdp 2"
    " --mesh.context 8 --parallel.context ring"
)
_128K_GATHERED = _128K.replace("ring", "all_gather")
_70B_PIPELINE = (
    "--config llama3_70b --target v5p:4x4x4 --train.batch_size 256"
    " --train.microbatches 32 --mesh.pipeline 8 --mesh.fsdp 4 --mesh.tensor 2"
    " --parallel.schedule 1f1b"
)
# Name -> what scripts/plan.py is asked, in the order of their worth.
ROWS = {
    "8B, v5p 8, full": _V5P8,
    "8B, v5p 8, keys and values saved": f"{_V5P8} --train.remat save:key+value",
    "8B, v5p 8, queries saved": f"{_V5P8} --train.remat save:query",
    "8B, v5p 8, attention's output saved": f"{_V5P8} --train.remat save:attention_out",
    "8B, v5p 8, inputs on the host": f"{_V5P8} --train.remat offload:layer_input",
    "8B, v5p 8, most saved": f"{_V5P8}"
    " --train.remat save:query+key+value+attention_out+ffn_in",
    "8B, v6e 16, full": "--config llama3_8b --target v6e:4x4 --train.batch_size 32"
    " --mesh.fsdp 16",
    "8B, v6e 8, reductions": "--config llama3_8b --target v6e:2x4"
    " --train.batch_size 8 --mesh.fsdp 8",
    "8B, v6e 16, tensor 2": "--config llama3_8b --target v6e:4x4 --train.batch_size 32"
    " --mesh.fsdp 8 --mesh.tensor 2",
    "8B, v5p 16, data 2": "--config llama3_8b --target v5p:2x2x4"
    " --train.batch_size 32 --mesh.data 2 --mesh.fsdp 8",
    "70B, v5p 64, full": "--config llama3_70b --target v5p:4x4x4"
    " --train.batch_size 128 --mesh.fsdp 64 --mesh.tensor 1",
    "Mixtral 8x7B, v5p 16": "--config mixtral_8x7b --target v5p:2x2x4"
    " --train.batch_size 32 --mesh.fsdp 4 --mesh.expert 4",
    "70B, v5p 64, pipeline 8": _70B_PIPELINE,
    "70B, v5p 64, pipeline 8, attention saved": f"{_70B_PIPELINE}"
    " --train.remat save:attention --parallel.balanced true",
    "70B, v5p 64, pipeline 8, not balanced": f"{_70B_PIPELINE}"
    " --parallel.balanced false",
    "70B, v5p 64, pipeline 8, recomputed": f"{_70B_PIPELINE} --parallel.recompute true",
    "70B, v5p 64, pipeline 8, interleaved": _70B_PIPELINE.replace("1f1b", "interleaved")
    + " --parallel.virtual_stages 2",
    "8B, 128k tokens, v5p 16": f"{_128K} --target v5p:2x2x4",
    "8B, 128k tokens, v5p 16, keys gathered": f"{_128K_GATHERED} --target v5p:2x2x4",
    "8B, 128k tokens, v5p 16, attention saved": f"{_128K} --target v5p:2x2x4"
    " --train.remat save:query+key+value+attention+attention_out",
    "8B, 128k tokens, v5p 16, keys gathered, attention saved": f"{_128K_GATHERED}"
    " --target v5p:2x2x4 --train.remat save:query+key+value+attention+attention_out",
    "8B, 8 H100, full": f"{_8B} --target h100:1x8 --model.document_mask false",
    "8B, 8 H100, full, fp8": f"{_8B} --target h100:1x8 --model.document_mask false"
    " --precision fp8",
    "8B, 8 H100, most saved": f"{_8B} --target h100:1x8 --model.document_mask false"
    " --train.remat save:query+key+value+attention+attention_out+ffn_in",
    "8B, 8 H100, inputs and attention on the host": f"{_8B} --target h100:1x8"
    " --model.document_mask false --train.remat offload:layer_input+attention",
    "8B, 128k tokens, 16 H100": f"{_128K} --target h100:2x8",
    "8B, 128k tokens, 16 H100, attention saved": f"{_128K} --target h100:2x8"
    " --train.remat save:query+key+value+attention+attention_out",
    "8B, 64 H100, full": "--config llama3_8b --target h100:8x8 --train.batch_size 128"
    " --mesh.data 8 --mesh.fsdp 8 --model.document_mask false",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=list(ROWS), metavar="NAME")
    parser.add_argument("--secs", type=float, default=1e9, help="start no row after")
    parser.add_argument("--again", action="store_true", help="rows that are there too")
    parser.add_argument("--quick", action="store_true", help="at less effort")
    parser.add_argument("--dump", type=pathlib.Path, help="where programs are kept")
    args = parser.parse_args(argv)
    path = RESULTS / "plan.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else {}
    began = time.monotonic()
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"there is no row {name!r}; the rows are: {', '.join(ROWS)}")
        if (name in known and not args.again) or time.monotonic() - began > args.secs:
            continue
        dump = args.dump and args.dump / name.replace(" ", "-")
        found = planned(ROWS[name], dump, is_quick=args.quick)
        if found is None:
            print(f"{name}: its compiler is not installed here", file=sys.stderr)
            continue
        known[name] = found
        known = {name: known[name] for name in ROWS if name in known}
        path.write_text(json.dumps({"rows": known}, indent=1) + "\n")
        (RESULTS / "plan.md").write_text(table(known))
        print(f"{name}: {json.dumps(found)}", flush=True)
    return 0


def planned(
    command: str, dump: pathlib.Path | None = None, *, is_quick: bool = False
) -> dict[str, Any] | None:
    """What scripts/plan.py tells, in short; None without the compiler."""
    words = shlex.split(command)
    target = targets.parse(words[words.index("--target") + 1])
    try:
        compilers.prepare_process(target)
    except ConfigError:
        return None
    called = [sys.executable, str(ROOT / "scripts" / "plan.py"), *words, "--json"]
    called += ["--dump-hlo", str(dump)] if dump else []
    called += ["--runtime.compiler_options", _LESS_VMEM] if is_quick else []
    level = {"JAX_OPTIMIZATION_LEVEL": "O1"} if is_quick else {}
    done = subprocess.run(called, capture_output=True, env=os.environ | level)
    if done.returncode:
        lines = done.stderr.decode().strip().splitlines()
        return {"command": command, "failed": " ".join(lines[-3:])[:600]}
    found = {"command": command, "is_quick": is_quick}
    found |= short(json.loads(done.stdout))
    return {k: v for k, v in found.items() if not (is_quick and k in _TIMES)}


def short(plan: dict[str, Any]) -> dict[str, Any]:
    """The figures of a plan that a table needs, in units that are read easily."""
    memory, compute = plan["memory"], plan["compute"]
    gb = lambda size: round(size / 1e9, 3)
    return {
        "versions": plan["versions"],
        "mesh": plan["mesh"],
        "remat": plan["remat"],
        "arguments_gb": gb(memory["arguments_bytes"]),
        "temporary_gb": gb(memory["temporary_bytes"]),
        "peak_gb": gb(memory["peak_bytes"]),
        "hbm_gb": gb(memory["hbm_bytes"]),
        "analytic_peak_gb": gb(memory["analytic_peak_bytes"]),
        "price_secs": round(compute["compute_secs"] + compute["waiting_secs"], 4),
        "compute_secs": round(compute["compute_secs"], 4),
        "waiting_secs": round(compute["waiting_secs"], 4),
        "kernel_secs": round(compute["kernel_secs"], 4),
        "step_secs": round(plan["step_secs"], 4),
        "tokens_per_sec": round(plan["tokens_per_sec"]),
        "mfu": round(plan["mfu"], 4),
        "hfu": round(plan["hfu"], 4),
        "model_tflop": round(compute["model_flops"] / 1e12, 1),
        "matmul_tflop": round(compute["matmul_flops"] / 1e12, 1),
        "kernel_calls": compute["kernel_calls"],
        "sent_gb": {
            f"{wire['kind']} {wire['axes']} {wire['how']}": round(
                wire["bytes"] / 1e9, 2
            )
            for wire in plan["wire"]
        },
        "waited_ms": {
            f"{wire['kind']} {wire['axes']} {wire['how']}": round(
                wire["waited_secs"] * 1e3, 1
            )
            for wire in plan["wire"]
            if wire["waited_secs"] >= 5e-5
        },
        "scopes_ms": {
            scope: round(secs * 1e3, 1)
            for scope, secs in compute["scopes"].items()
            if secs >= 5e-5
        },
        "compile_secs": round(plan["compile_secs"], 1),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Steps compiled for hardware that is not here",
        "",
        "Made by `scripts/plan_rows.py` (the commands are in `plan.json`): the real",
        "step through the target's own compiler. Price: compute and waiting for the",
        "link, kernels free; step: with them, attention at the share of peak that",
        "`jaxinfra/plan/targets.py` has (for TPUs an assumption), grouped matmuls at",
        "peak. On GPUs the price is a roofline of every kernel but attention, matmuls",
        "at a measured share of peak. Predictions, not measured times. MFU: of",
        "the bfloat16 peak, for fp8 too. Peak: arguments, temporaries and code of a",
        "device. Rows without times were compiled at less effort (`--quick`).",
        "",
        "| what | arguments + temporaries, GB | peak of HBM, GB | by arithmetic"
        " | price: compute + waiting, s | step, s | MFU | on the wire, GB"
        " | compiled in, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed'][:160]} |||||||||")
            continue
        sent = row["sent_gb"]
        host = sum(gb for kind, gb in sent.items() if kind.startswith("copy host"))
        wire = f"{sum(sent.values()) - host:.1f}"
        wire += f" (and {host:.1f} with the host)" if host else ""
        price, step, mfu = "", "", ""
        if not row["is_quick"]:
            price = f"**{row['price_secs']:.3f}**: {row['compute_secs']:.3f}"
            price += f" + {row['waiting_secs']:.3f}"
            step, mfu = f"{row['step_secs']:.3f}", f"{row['mfu']:.1%}"
        lines.append(
            f"| {name} | {row['arguments_gb']:.2f} + {row['temporary_gb']:.2f}"
            f" | {row['peak_gb']:.2f} of {row['hbm_gb']:.1f}"
            f" | {row['analytic_peak_gb']:.2f} | {price} | {step} | {mfu} | {wire}"
            f" | {row['compile_secs']:.0f} |"
        )
    lines += ["", "Where the core's time goes, ms (the ten largest):", ""]
    for name, row in rows.items():
        largest = list(row.get("scopes_ms", {}).items())[:10]
        told = "; ".join(f"{scope} {ms:g}" for scope, ms in largest)
        lines.append(f"- **{name}**: {told}") if largest else None
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
