"""Run as a program, with MaxText 0.2.5 and libtpu: its training step beside ours.

    python maxtext_step.py RESULTS.json [--only NAME] [--hlo FOLDER]

Compiles MaxText's step by its own `train_compile` for the rows of scripts/plan_rows.py
that it can do, with the options of the target that ours has and those found best for
it, prices the program by the same `jaxinfra.plan`, and compiles ours after it in the
same environment, so that the seconds of both compilers are of one machine in one hour.
A row that RESULTS.json has is not compiled again. Attention is its splash kernel;
float32 parameters and moments, segment ids and clipping are on in both.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "DECOUPLE_GCLOUD": "TRUE",  # of MaxText: no cloud is asked
}
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # plan_rows
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import plan_rows
from maxtext.trainers.pre_train import train_compile
from maxtext.utils import max_utils

from jaxinfra import compiler_options
from jaxinfra.plan import cost, program, targets

PLAN = pathlib.Path(plan_rows.__file__).with_name("plan.py")
# Collective matmuls in windows cost it more than they hide.
_NO_WINDOWS = "xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
# Row of plan_rows -> (jax's kind of device, MaxText's settings).
ROWS = {
    "8B, v5p 8, full": (
        "TPU v5",
        "model_name=llama3-8b compile_topology=v5p-16 ici_fsdp_parallelism=8"
        " per_device_batch_size=2 max_target_length=4096 remat_policy=full",
    ),
    "8B, v6e 16, full": (
        "TPU v6e",
        "model_name=llama3-8b compile_topology=v6e-16 ici_fsdp_parallelism=16"
        " per_device_batch_size=2 max_target_length=4096 remat_policy=full",
    ),
    "70B, v5p 64, full": (
        "TPU v5",
        "model_name=llama3-70b compile_topology=v5p-128 ici_fsdp_parallelism=64"
        " per_device_batch_size=2 max_target_length=8192 remat_policy=full",
    ),
    "Mixtral 8x7B, v5p 16": (
        "TPU v5",
        "model_name=mixtral-8x7b compile_topology=v5p-32 ici_fsdp_parallelism=4"
        " ici_expert_parallelism=4 per_device_batch_size=2 max_target_length=4096"
        " remat_policy=full",
    ),
    "8B, 128k tokens, v5p 16": (
        "TPU v5",
        "model_name=llama3-8b compile_topology=v5p-32 ici_fsdp_parallelism=2"
        " ici_context_parallelism=8 per_device_batch_size=0.125"
        " max_target_length=131072 remat_policy=full",
    ),
    "70B, v5p 64, pipeline 8": (
        "TPU v5",
        "model_name=llama3-70b compile_topology=v5p-128 ici_pipeline_parallelism=8"
        " ici_fsdp_parallelism=4 ici_tensor_parallelism=2 per_device_batch_size=4"
        " allow_split_physical_axes=true num_pipeline_microbatches=32"
        " num_layers_per_pipeline_stage=5 max_target_length=8192 remat_policy=full",
    ),
}
_EVERY = (
    "attention=flash dataset_type=synthetic enable_checkpointing=false"
    " compile_topology_num_slices=1"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--only", choices=ROWS)
    parser.add_argument("--hlo", type=pathlib.Path)
    args = parser.parse_args(argv)
    known = json.loads(args.results.read_text()) if args.results.exists() else {}
    for name in [args.only] if args.only else ROWS:
        if name in known:
            continue
        known[name] = {"maxtext": theirs(name, args.hlo), "jaxinfra": ours(name)}
        args.results.write_text(json.dumps(known, indent=1) + "\n")
        print(name, json.dumps(known[name]), flush=True)
    return 0


def theirs(name: str, folder: pathlib.Path | None) -> dict:
    """Bytes, price and seconds of MaxText's step."""
    kind, settings = ROWS[name]
    options = compiler_options.for_device(kind, _NO_WINDOWS)
    options.pop("xla_jf_bf16_propagation", None)  # ours alone
    flags = " ".join(f"--{key}={value}" for key, value in options.items())
    compiled, axes, secs = _compiled([*settings.split(), *_EVERY.split()], flags)
    text = compiled.as_text()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"maxtext {name}.txt").write_text(text)
    chip = targets.parse(plan_rows.ROWS[name].split("--target ")[1].split()[0]).chip
    played = cost.play(
        program.parse(text),
        clock=cost.cycles_at(chip.clock_hz),
        link_bytes_per_sec=chip.link_bytes_per_sec,
        host_bytes_per_sec=chip.host_bytes_per_sec,
        axes=axes,
    )
    memory = compiled.memory_analysis()
    return {
        "settings": settings,
        "compiler_options": options,
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 3),
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 3),
        "price_secs": round(played.secs, 4),
        "compute_secs": round(played.compute_secs, 4),
        "waiting_secs": round(played.waiting_secs, 4),
        "matmul_tflop": round(played.matmul_flops / 1e12, 1),
        "kernel_calls": played.kernels,
        "compile_secs": round(secs, 1),
    }


def _compiled(words: list[str], flags: str):
    """(MaxText's compiled step, sizes of its mesh, the compiler's seconds), by its own
    main program."""
    found = []

    def jit_and_compile(
        func, args, kwargs, mesh, in_shardings, out_shardings, static, donated, _, rules
    ):
        with jax.set_mesh(mesh), rules:
            jitted = jax.jit(
                func,
                in_shardings=in_shardings,
                out_shardings=out_shardings,
                static_argnums=static,
                donate_argnums=donated,
            )
            lowered = jitted.lower(*args, **kwargs)
        began = time.perf_counter()
        options = max_utils.parse_libtpu_flags_to_dict(flags)
        compiled = lowered.compile(compiler_options=options)
        found.extend([compiled, dict(mesh.shape), time.perf_counter() - began])
        return compiled

    train_compile.jit_and_compile = jit_and_compile
    package = pathlib.Path(train_compile.__file__).parents[2]
    train_compile.main(["", str(package / "configs" / "base.yml"), *words])
    return tuple(found)


def ours(name: str) -> dict:
    """What plan_rows has of our row, compiled now with the compiler as it comes."""
    command = [sys.executable, str(PLAN), "--json"]
    command += plan_rows.ROWS[name].split()
    env = os.environ | {"PYTHONPATH": str(PLAN.parents[1])}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env)
    keys = (
        "arguments_gb", "temporary_gb", "price_secs", "compute_secs", "waiting_secs",
        "matmul_tflop", "kernel_calls", "compile_secs",
    )  # fmt: skip
    found = plan_rows.short(json.loads(done.stdout))
    return {key: found[key] for key in keys}


if __name__ == "__main__":
    sys.exit(main())
