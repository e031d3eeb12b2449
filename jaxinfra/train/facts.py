"""What a run tells of itself: a headline, bytes at rest, FLOPs and peak, a profile."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxinfra
from jaxinfra import params, sharding, stages
from jaxinfra.config import Config, ModelConfig, ProfileConfig
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Layout
from jaxinfra.train import loop
from jaxinfra.train.state import TrainState

# Dense bfloat16 peak of a chip, FLOP/s, by jax's device_kind. Sources: cloud.google.com
# TPU system architecture pages; NVIDIA H100 and A100 data sheets (SXM).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H200": 989.5e12,
}


def headline(
    config: Config, specs: Tree, layout: Layout, *, start: int, run_dir: Any
) -> str:
    """One line: model, size, precision, mesh, where it starts and where it lives."""
    mesh = layout.mesh
    used = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    return (
        f"{config.name}: {params.count(specs):,} parameters, {config.precision}, "
        f"{mesh.size} x {mesh.devices.flat[0].device_kind} "
        f"({' x '.join(used) or 'one device'}); "
        f"{'goes on after' if start else 'from'} step {start} in {run_dir}"
    )


def bytes_at_rest(
    state: TrainState, specs: Tree, layout: Layout, policy: Policy
) -> dict[str, int]:
    """Bytes on one device, as metrics; gradients as they leave the backward pass.
    `state` may be abstract."""
    grads = params.abstract(specs, layout, layout.grads, policy.param)
    trees = {"params": state.params, "grads": grads, "opt": state.opt_state}
    return {
        f"memory/{name}_bytes": sharding.bytes_per_device(tree)
        for name, tree in trees.items()
    }


def loop_schedule(
    config: Config, flops_per_row: float, mesh: jax.sharding.Mesh
) -> loop.Schedule:
    """When the loop does what, and what MFU is measured against, if FLOPs are known."""
    train = config.train
    sizes = stages.BatchSizes(train.batch_size, train.batch_ramp)
    peak = peak_flops(mesh.devices.flat[0]) if flops_per_row else None
    return loop.Schedule(
        steps=train.steps,
        save_every=train.save_every,
        eval_every=config.eval.every,
        max_bad_steps=train.max_bad_steps,
        flops_of=lambda step: flops_per_row * sizes.of(step),
        peak_flops=peak and peak * mesh.size,
    )


def train_flops_per_token(cfg: ModelConfig, specs: Tree, *, length: int) -> float:
    """Forward and backward FLOPs of a token: 6 N + 6 L N_heads H T, causal attention.

    N counts every parameter that multiplies activations (a tied table once, as head); a
    window counts as full attention over it; recomputation does not count.
    Source: arXiv:2204.02311 appendix B, halved scores for causality.
    """
    matmuls = params.count(specs, embeddings=False)
    if cfg.num_experts:  # a token meets some of the experts
        rest = cfg.num_experts - cfg.experts_per_token
        of_experts = [s for s in jax.tree.leaves(specs) if "experts" in s.axes]
        matmuls -= params.count(of_experts) * rest // cfg.num_experts
    if cfg.tied:
        matmuls += cfg.vocab_size * cfg.width
    attention = 0.0
    for layer in cfg.layers:
        seen = min(layer.window or length, length)
        # Keys seen by an average query: half of them, but all of a window behind it.
        average = seen - seen**2 / (2 * length)
        attention += 12.0 * cfg.num_heads * cfg.head_width * average
    return 6.0 * matmuls + attention


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of one device; a CPU's is measured, None where it is not known."""
    if device.platform == "cpu":
        return measured_peak() / jax.local_device_count()
    return PEAK_FLOPS.get(device.device_kind)


def measured_peak(size: int = 1024, repeats: int = 3) -> float:
    """FLOP/s of float32 matrix products on this machine's CPU, best of `repeats`."""
    here = jax.make_mesh((1,), ("one",), devices=jax.local_devices()[:1])
    best = float("inf")
    with jax.set_mesh(here):  # not the run's, which other processes may be part of
        x = jnp.ones((size, size), jnp.float32)
        product = jax.jit(jnp.matmul).lower(x, x).compile()
        for _ in range(repeats + 1):
            start_secs = time.perf_counter()
            jax.block_until_ready(product(x, x))
            best = min(best, time.perf_counter() - start_secs)
    return 2 * size**3 / best


def profiler(
    settings: ProfileConfig, run_dir: Any
) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """A function to call before every step; loaded where there is something to do."""
    if not settings.steps:
        return contextlib.nullcontext(lambda step: None)
    return jaxinfra.tracing(run_dir, start=settings.start, steps=settings.steps)
