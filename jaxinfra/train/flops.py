"""Model FLOPs of a token and the peak of the device, for MFU."""

import time

import jax
import jax.numpy as jnp

from jaxinfra import params
from jaxinfra.config import ModelConfig
from jaxinfra.params import Tree

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


def train_flops_per_token(cfg: ModelConfig, specs: Tree, *, length: int) -> float:
    """Forward and backward FLOPs of a token: 6 N + 6 L N_heads H T, causal attention.

    N counts every parameter that multiplies activations (a tied table once, as head); a
    window counts as full attention over it; recomputation does not count.
    Source: arXiv:2204.02311 appendix B, halved scores for causality.
    """
    matmuls = params.count(specs, embeddings=False)
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
