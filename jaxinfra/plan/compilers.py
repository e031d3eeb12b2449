"""A training step through the compiler of hardware that is not here.

Sources: jax.experimental.topologies; the GPU's description is XLA's
GpuTargetConfigProto, with the figures of NVIDIA's H100 SXM.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re
import time
from typing import Any, NamedTuple

from jaxinfra.config import ConfigError
from jaxinfra.plan.targets import Target

_EXTRAS = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda13_plugin", "cuda")}
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  runtime_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# What a program would use, in the two forms in which libtpu refuses it. The first says
# "temporaries" and means arguments too.
_REFUSED = re.compile(
    r"(?:required for HLO temporaries \(|in memory space hbm\. Used )"
    r"([\d.]+)([KMGT]?)\)? (?:exceeds available HBM|of )"
)


class DoesNotFit(Exception):
    """The compiler refused a step that would use `peak_bytes` of a device, arguments
    included; its message rounds them to a hundredth of their unit, as in 19.76 GiB."""

    def __init__(self, peak_bytes: int):
        super().__init__(f"the step would use {peak_bytes} bytes of a device")
        self.peak_bytes = peak_bytes


class Compiled(NamedTuple):
    """A step's program as text, its compiler's figures of memory (bytes a device), and
    the seconds that compiling took."""

    text: str
    arguments_bytes: int
    outputs_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    code_bytes: int
    secs: float

    @property
    def peak_bytes(self) -> int:
        """All that is held at once: donated arguments are their outputs."""
        outputs = self.outputs_bytes - self.aliased_bytes
        return self.arguments_bytes + outputs + self.temporary_bytes + self.code_bytes


def prepare_process(target: Target) -> None:
    """Sets what must stand in the environment before jax is imported, so that it looks
    for no device; ConfigError if the target's compiler is not installed."""
    module, extra = _EXTRAS[target.chip.platform]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"--target {target.name}: its compiler, the package {module}, is not"
            f" installed; pip install 'jaxinfra[{extra}]', or ask for --analytic"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # Nothing runs on a TPU here, so several processes may compile side by side.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def versions(target: Target) -> dict[str, str]:
    """Of jax and of the package that the target's compiler comes in."""
    package = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}[target.chip.platform]
    return {name: importlib.metadata.version(name) for name in ("jax", package)}


def devices(target: Target) -> list[Any]:
    """The devices of the topology, to make a mesh of; ConfigError if the compiler knows
    none of that shape."""
    from jax.experimental import topologies

    shape = "x".join(map(str, target.shape))
    try:
        if target.chip.platform == "tpu":
            found = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{target.kind}:{shape}",
                wrap=target.wraps,
                num_slices=target.slices,
            )
        else:
            nodes, each = target.shape
            found = topologies.get_topology_desc(
                platform="cuda",
                topology=f"1x{nodes}x{each}",
                target_config=_H100,
            )
    except Exception as error:  # jaxlib's own kinds differ by version and platform
        raise ConfigError(
            f"--target {target.name}: the compiler has no such topology ({error});"
            " use a shape that the cloud offers, such as v5p:2x2x4, v6e:8x8 or h100:2x8"
        ) from error
    return list(found.devices)


def compile_step(experiment: Any, state: Any, batch: Any) -> Compiled:
    """Lowers and compiles `experiment.train_step` for shapes with shardings.

    DoesNotFit where the compiler refuses it; a GPU's compiles what does not fit.
    """
    import jax

    with jax.set_mesh(experiment.layout.mesh):
        lowered = experiment.train_step.lower(state, batch)
        started_secs = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            peak_bytes = refused_bytes(str(error))
            if peak_bytes is None:
                raise
            raise DoesNotFit(peak_bytes) from error
        secs = time.perf_counter() - started_secs
    memory = compiled.memory_analysis()
    field = functools.partial(getattr, memory)
    return Compiled(
        text=compiled.as_text(),
        arguments_bytes=field("argument_size_in_bytes"),
        outputs_bytes=field("output_size_in_bytes"),
        aliased_bytes=field("alias_size_in_bytes"),
        temporary_bytes=field("temp_size_in_bytes"),
        code_bytes=field("generated_code_size_in_bytes"),
        secs=secs,
    )


def refused_bytes(message: str) -> int | None:
    """What a program needs of a device, by the compiler's message that this does not
    fit; None where it says something else."""
    found = _REFUSED.search(message)
    if found is None:
        return None
    return round(float(found[1]) * 2 ** (10 * " KMGT".index(found[2] or " ")))
