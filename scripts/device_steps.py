"""Training steps of a Llama of 1.2 billion parameters on one GPU.

    python scripts/device_steps.py [ROW ...]     measured on the GPU that is here
    python scripts/device_steps.py --foretell    what scripts/plan.py says of each row,
                                                 by H100's compiler; needs no GPU

Each row is a process of its own, so that its peak of memory is its own. Beside them
PyTorch runs the same model compiled, if it is installed. Results go to
scripts/results/device_steps.json after each row.
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
ROWS, LENGTH, WARMUP, STEPS = 4, 4096, 3, 10
# Llama-3.2-1B's shapes. Rows of one document: cuDNN's kernel has no segments.
_MODEL = [
    "--config", "llama3_8b", "--model.width", "2048", "--model.ffn_width", "8192",
    "--model.repeats", "16", "--model.tied", "true", "--mesh.fsdp", "1",
    "--train.batch_size", str(ROWS), "--train.length", str(LENGTH),
    "--optimizer.warmup_steps", "10",
]  # fmt: skip
_CUDNN = ["--model.document_mask", "false"]
_SAVED = ["--train.remat", "save:query+key+value+attention+attention_out+ffn_in"]
# Row -> settings of scripts/train.py beyond those.
KINDS: dict[str, list[str]] = {
    "bfloat16": _CUDNN,
    "bfloat16, most saved": [*_CUDNN, *_SAVED],
    "bfloat16, all saved": [*_CUDNN, "--train.remat", "none"],
    "fp8": [*_CUDNN, "--precision", "fp8"],
    "fp8 delayed": [*_CUDNN, "--precision", "fp8", "--quant.scaling", "delayed"],
    "fp8, most saved": [*_CUDNN, *_SAVED, "--precision", "fp8"],
    "int8": [*_CUDNN, "--precision", "int8"],
    "bfloat16, optimizer in host memory": [*_CUDNN, "--optimizer.offload", "true"],
    "bfloat16, moments in 8 bits": [
        *_CUDNN, "--optimizer.name", "adamw", "--optimizer.moments", "8bit",
    ],
    "bfloat16, documents apart": [],
}  # fmt: skip
PEERS = {"torch compiled": "full", "torch compiled, all saved": "none"}


def main(argv: list[str]) -> int:
    if argv[:1] == ["--one"]:
        print(json.dumps(measured(KINDS[argv[1]])))
        return 0
    if argv[:1] == ["--foretell"]:
        for row in argv[1:] or KINDS:
            _record(row, "foretold", _called("plan", *_words(row), "--json"))
        return 0
    for row in argv or [*KINDS, *PEERS]:
        if row in PEERS:
            if importlib.util.find_spec("torch"):
                sizes = map(str, (ROWS, LENGTH, WARMUP, STEPS))
                _record(row, "measured", _json(str(PEER), PEERS[row], *sizes))
        else:
            _record(row, "measured", _called("device_steps", "--one", row))
    return 0


def measured(settings: list[str]) -> dict[str, Any]:
    """Seconds a step, tokens a second, MFU, the peak of memory, losses."""
    from jaxinfra import launcher, options

    config, _ = options.read_command([*_MODEL, *settings])
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


def _words(row: str) -> list[str]:
    return [*_MODEL, *KINDS[row], "--target", "h100:1x1"]


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
    results.setdefault(row, {})[part] = found
    order = [name for name in (*KINDS, *PEERS) if name in results]
    RESULTS.write_text(json.dumps({k: results[k] for k in order}, indent=1) + "\n")
    print(f"{row}: {json.dumps(found)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
