"""Training steps of Llamas of 1.2 and 2.3 billion parameters on one GPU.

    python scripts/device_steps.py [ROW ...]     measured on the GPU that is here
    python scripts/device_steps.py --foretell    what scripts/plan.py says of each row,
                                                 by H100's compiler; needs no GPU

Each row is a process of its own, so that its peak of memory is its own. Beside them
PyTorch runs a model of the same shapes compiled, if it is installed: speed and memory
are compared, and not losses, which begin from other parameters. MFU is of the bfloat16
peak, for fp8 and int8 too. Results go to scripts/results/device_steps.json after each
row; one that fails is told, keeps what it had there, and ends the command with 1.
"""

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "device_steps.json"
PEER = ROOT / "scripts" / "peers" / "torch_llama.py"
ROWS, LENGTH, WARMUP, STEPS = 4, 4096, 3, 6
# Llama-3.2-1B's shapes; and 8 layers of Llama-3-8B's, 2.3 billion parameters.
_COMMON = [
    "--config", "llama3_8b", "--model.tied", "true", "--mesh.fsdp", "1",
    "--train.batch_size", str(ROWS), "--train.length", str(LENGTH),
    "--optimizer.warmup_steps", "10",
]  # fmt: skip
_SMALL = ["--model.width", "2048", "--model.ffn_width", "8192"]
_MODEL = [*_COMMON, *_SMALL, "--model.repeats", "16"]
_WIDE = [*_COMMON, "--model.repeats", "8"]
# Rows of one document, as PyTorch's are; documents apart need a mask on a GPU.
_WHOLE = ["--model.document_mask", "false"]
_SAVED = ["--train.remat", "save:query+key+value+attention+attention_out+ffn_in"]
_FP8 = ["--precision", "fp8"]
_DELAYED = [*_FP8, "--quant.scaling", "delayed"]
# Row -> settings of scripts/train.py.
KINDS: dict[str, list[str]] = {
    "bfloat16": [*_MODEL, *_WHOLE],
    "fp8": [*_MODEL, *_WHOLE, *_FP8],
    "fp8 delayed": [*_MODEL, *_WHOLE, *_DELAYED],
    "8B's layers, bfloat16": [*_WIDE, *_WHOLE],
    "8B's layers, fp8": [*_WIDE, *_WHOLE, *_FP8],
    "8B's layers, fp8 delayed": [*_WIDE, *_WHOLE, *_DELAYED],
    "fp8 delayed, no figures": [
        *_MODEL, *_WHOLE, *_DELAYED, "--quant.figures", "false",
    ],
    "bfloat16, documents apart": _MODEL,
    "bfloat16, most saved": [*_MODEL, *_WHOLE, *_SAVED],
    "bfloat16, optimizer in host memory": [
        *_MODEL, *_WHOLE, "--optimizer.offload", "true",
    ],
    "int8": [*_MODEL, *_WHOLE, "--precision", "int8"],
}  # fmt: skip
# Of the smaller model.
PEERS = {"torch compiled": "full", "torch compiled, all saved": "none"}


def main(argv: list[str]) -> int:
    if argv[:1] == ["--one"]:
        print(json.dumps(measured(KINDS[argv[1]])))
        return 0
    is_foretold = argv[:1] == ["--foretell"]
    known = KINDS if is_foretold else {**KINDS, **PEERS}
    rows = argv[is_foretold:] or list(known)
    if unknown := [row for row in rows if row not in known]:
        print(f"there is no row {unknown[0]!r}: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = 0
    for row in rows:
        if is_foretold:
            found = _called("plan", *KINDS[row], "--target", "h100:1x1", "--json")
        elif row in KINDS:
            found = _called("device_steps", "--one", row)
        elif importlib.util.find_spec("torch"):
            sizes = map(str, (ROWS, LENGTH, WARMUP, STEPS))
            found = _json(str(PEER), PEERS[row], *sizes)
        else:
            found = {"failed": "torch is not installed"}
        failed += "failed" in found
        _record(row, "foretold" if is_foretold else "measured", found)
    return int(failed > 0)


def measured(settings: list[str]) -> dict[str, Any]:
    """Seconds a step, tokens a second, MFU, the peak of memory, losses."""
    from jaxinfra import launcher, options

    config, _ = options.read_command(settings)
    launcher.prepare_process(config)
    import jax
    import numpy as np

    from jaxinfra import experiment
    from jaxinfra.data import packing
    from jaxinfra.train import facts

    built = experiment.build(config, jax.devices()[:1])
    device = jax.devices()[0]
    with jax.set_mesh(built.layout.mesh):
        place = experiment.batch_sharding(built.layout)
        vocab_size = config.model.vocab_size
        tokens = np.random.default_rng(0).integers(0, vocab_size, (ROWS, LENGTH + 1))
        batch = packing.Batch(
            jax.device_put(tokens.astype(np.uint32), place),
            jax.device_put(np.full((ROWS, 1), LENGTH + 1, np.uint16), place),
        )
        state, losses, secs = built.init(), [], []
        begin = time.perf_counter()
        state, metrics = built.train_step(state, batch)
        losses.append(float(metrics["loss"]))
        compile_secs = time.perf_counter() - begin
        for count in (WARMUP - 1, STEPS, STEPS, STEPS):
            begin = time.perf_counter()
            for _ in range(count):  # sent without waiting, as the loop does
                state, metrics = built.train_step(state, batch)
            losses.append(float(metrics["loss"]))
            secs.append((time.perf_counter() - begin) / count)
    step_secs = statistics.median(secs[1:])
    peak = facts.peak_flops(device)
    flops = built.task.flops_per_row * ROWS
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "secs": step_secs,
        "spread": max(secs[1:]) / min(secs[1:]) - 1,
        "tokens_per_sec": ROWS * LENGTH / step_secs,
        "mfu": peak and flops / step_secs / peak,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "compile_secs": compile_secs,
        "losses": losses,
    }


def _called(script: str, *words: str) -> dict[str, Any]:
    return _json(str(ROOT / "scripts" / f"{script}.py"), *words)


def _json(*command: str) -> dict[str, Any]:
    # Most of the device's memory: a row may need it.
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94"} | os.environ
    done = subprocess.run([sys.executable, *command], capture_output=True, env=env)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return {"failed": "\n".join(lines[-6:])[-1500:]}
    return json.loads(done.stdout)


def _record(row: str, part: str, found: dict[str, Any]) -> None:
    if part == "foretold" and "failed" not in found:
        memory, keep = found["memory"], ("step_secs", "mfu", "compile_secs", "versions")
        peaks = {k: memory[k] for k in ("peak_bytes", "analytic_peak_bytes")}
        found = {key: found[key] for key in keep} | peaks
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "failed" not in found or part not in results.get(row, {}):
        results.setdefault(row, {})[part] = found
    order = [name for name in (*KINDS, *PEERS) if name in results]
    RESULTS.write_text(json.dumps({k: results[k] for k in order}, indent=1) + "\n")
    print(f"{row}: {json.dumps(found)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
