"""Options of the compilers by target: data, each with what it was measured to do.

They decide more than code does: a Llama-3-8B step of v5p 2x2x2, fsdp 8, 16 rows of
4096, priced from its compiled program (`plan.cost`), went from 1.70 to 1.24 s by those
of "TPU v5" alone. `experiment.build` gives them to `jax.jit` where the mesh is of that
target; the key `runtime.compiler_options` changes or drops each.
"""

from typing import Any

# Figures of TPUs are prices of compiled programs, not times of a device. "2 layers" is
# Llama 3 8B's width with model.repeats 2, 8 rows of 4096 on 8 chips (v5p 2x2x2, v5e and
# v6e 2x4), full remat, jax 0.12.0.1 and libtpu 0.0.52: a step without the option and
# with it, all others of the target given but for the wide VMEM. By scripts/plan.py
# --config llama3_8b --model.repeats 2 --train.batch_size 8 --mesh.fsdp 8
# --runtime.compiler_options xla_tpu_scoped_vmem_limit_kib=,NAME=

# Collectives run on the SparseCores, beside the matrix units. Measured on v5p as above:
# waiting for the link falls from 0.235 to 0.039 s, compute stays 1.46 s. 2 layers on
# v6e: 94.5 ms without any of them, 82.1 with all. Each alone, 2 layers, fsdp 8, is told
# below. Left out: ..._all_gather_offload_tracing, which adds trace points alone, and
# xla_tpu_use_tc_device_shape_on_sc, with which the program of v5p is the same.
_SPARSE_CORE = {
    # v5p 106.2 ms to 99.7, v6e 88.0 to 82.1.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    # v6e 87.3 ms to 82.1; v5p nothing: gradients of fsdp alone are all-reduced there.
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    # v5p 106.5 ms to 99.7, v6e nothing; data 2 x fsdp 4: v5p 109.6 to 108.7, v6e 100.1
    # to 98.7.
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
}

# VMEM that one fusion may use. Measured on v5p beside the above: compute falls from
# 1.455 s to 1.242 (32768), 1.205 (49152), 1.202 s (65536); compiling takes 115 s in
# place of 34. 2 layers on v6e: 82.1 ms to 71.6, compiling 206 s in place of 90.
_WIDE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": "65536"}

# Types stay as they are written. Else the compiler, which sees that a float32 stack of
# layers is only read as bfloat16, casts all of it before the loop over layers and keeps
# both. Measured on v5p as above: 22.2 GB of arguments and temporaries become 21.1, and
# 1.148 s 1.143. 2 layers: v6e 4.31 GB to 4.24 and 82.6 ms to 82.1, v5e 4.51 GB to 4.45
# and 267.8 ms to 267.3.
_NO_PROPAGATION = {"xla_jf_bf16_propagation": "false"}

# Matmuls by cuBLAS alone. Measured on one H100, a Llama of 1.2 billion parameters, 4 x
# 4,096 tokens, full remat (scripts/device_steps.py): with kernels that the compiler
# writes a step takes 0.340 s, fp8 0.332 s; without them 0.330 s and 0.314 s.
_CUBLAS = {"xla_gpu_enable_triton_gemm": "false"}

# A matmul whose result is kept for the backward pass, and used at once too, runs once.
# Else jax 0.11's compiler runs it twice, of which one writes into the stack of what is
# kept. Measured on one H200, the same model, most activations saved: 0.303 s where they
# run twice, 0.278 s where once; with full remat 0.317 s either way. On an H100 0.330 s
# and 0.295 s, two versions apart.
_ONCE = {"xla_gpu_enable_dynamic_slice_fusion": "false"}

_WITH_SPARSE_CORE = _SPARSE_CORE | _WIDE_VMEM | _NO_PROPAGATION

# By jax's device_kind. v5e has no SparseCore: its collectives are asynchronous fusions
# by default. A platform that is not here compiles with its own defaults.
OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5": _WITH_SPARSE_CORE,
    "TPU v5p": _WITH_SPARSE_CORE,
    "TPU v5 lite": _NO_PROPAGATION,
    "TPU v6 lite": _WITH_SPARSE_CORE,
    "TPU v6e": _WITH_SPARSE_CORE,
    "NVIDIA H100 80GB HBM3": _CUBLAS | _ONCE,
    "NVIDIA H200": _CUBLAS | _ONCE,
}


def options_for(mesh: Any, changes: str = "") -> dict[str, str] | None:
    """The options for the devices of a `jax.sharding.Mesh`; None where there are
    none."""
    options = for_device(mesh.devices.flat[0].device_kind, changes)
    # XLA's own are True and False, where the TPU's compiler has true and false.
    said = lambda name, value: value.title() if name.startswith("xla_gpu_") else value
    return {name: said(name, value) for name, value in options.items()} or None


def for_device(kind: str, changes: str = "") -> dict[str, str]:
    """The options for devices of `kind`, with `changes`: "name=value,name=,none" sets
    one, drops one, drops all that stand before it (`checks` knows the form; whether a
    compiler knows a name, it alone can say)."""
    options = dict(OPTIONS.get(kind, {}))
    for part in filter(None, changes.split(",")):
        name, _, value = part.partition("=")
        if name == "none":
            options.clear()
        elif value:
            options[name] = value
        else:
            options.pop(name, None)
    return options
