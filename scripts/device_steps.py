"""Training steps of Llamas of 1.2 and 2.3 billion parameters on one Hopper GPU.

    python scripts/device_steps.py [ROW ...]     measured on the GPU that is here
    python scripts/device_steps.py --kernels ROW milliseconds of each kernel in a step
    python scripts/device_steps.py --foretell    what scripts/plan.py says of each row,
                                                 by H100's compiler; needs no GPU

Each row is a process of its own, so that its peak of memory is its own. Beside them
PyTorch runs a model of the same shapes compiled, if it is installed: speed and memory
are compared, and not losses, which begin from other parameters. MFU is of the bfloat16
peak, for fp8 and int8 too. Results go to scripts/results/device_steps.json after each
row, by the device's name; one that fails is told and not written, and ends the command
with 1.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "device_steps.json"
PEER = ROOT / "scripts" / "peers" / "torch_llama.py"
sys.path.insert(0, str(PEER.parent))
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
# As the compiler does by itself: compiler_options.py.
_FUSED = ["--runtime.compiler_options", "xla_gpu_enable_dynamic_slice_fusion=true"]
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
    "bfloat16, slices fused": [*_MODEL, *_WHOLE, *_FUSED],
    "bfloat16, most saved, slices fused": [*_MODEL, *_WHOLE, *_SAVED, *_FUSED],
    "bfloat16, all saved": [*_MODEL, *_WHOLE, "--train.remat", "none"],
    "bfloat16, layers' inputs in host memory": [
        *_MODEL, *_WHOLE, "--train.remat", "offload:layer_input",
    ],
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
    is_foretold, is_kernels = (argv[:1] == [w] for w in ("--foretell", "--kernels"))
    is_of_ours = is_foretold or is_kernels
    known = KINDS if is_of_ours else {**KINDS, **PEERS}
    rows = argv[is_of_ours:] or list(known)
    if unknown := [row for row in rows if row not in known]:
        print(f"there is no row {unknown[0]!r}: {', '.join(known)}", file=sys.stderr)
        return 2
    if is_kernels:
        if len(argv) != 2:
            print(__doc__, file=sys.stderr)
            return 2
        return kernels(rows[0])
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
        print(f"{row}: {json.dumps(found)}", file=sys.stderr, flush=True)
        if "failed" in found:
            failed += 1
        elif is_foretold:
            _record(row, "foretold", _in_short(found))
        else:
            _record(row, found.pop("device"), found)
    return int(failed > 0)


def measured(settings: list[str]) -> dict[str, Any]:
    """Seconds a step, tokens a second, MFU, the peak of memory, losses."""
    built = _build(settings)
    import timed_steps  # pyright: ignore[reportMissingImports]

    return timed_steps.measured(built, warmup=WARMUP, steps=STEPS, rounds=3)


def kernels(row: str) -> int:
    """Prints what the GPU ran in a step."""
    built = _build(KINDS[row])
    import timed_steps  # pyright: ignore[reportMissingImports]

    for name, (ms, calls) in timed_steps.kernels(built, steps=2).items():
        print(f"{ms:9.3f} ms {calls:6.1f}  {name[:120]}")
    return 0


def _build(settings: list[str]) -> Any:
    """The experiment on one device; jax loads here, in a process made ready for it."""
    from jaxinfra import launcher, options

    config, _ = options.read_command(settings)
    launcher.prepare_process(config)
    import jax

    from jaxinfra import experiment

    return experiment.build(config, jax.devices()[:1])


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


def _in_short(plan: dict[str, Any]) -> dict[str, Any]:
    peaks = ("peak_bytes", "analytic_peak_bytes")
    keep = ("step_secs", "mfu", "compile_secs", "versions")
    memory = plan["memory"]
    return {key: plan[key] for key in keep} | {key: memory[key] for key in peaks}


def _record(row: str, where: str, found: dict[str, Any]) -> None:
    """`where`: the device's name, or foretold."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.setdefault(row, {})[where] = found
    order = [name for name in (*KINDS, *PEERS) if name in results]
    RESULTS.write_text(json.dumps({k: results[k] for k in order}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
