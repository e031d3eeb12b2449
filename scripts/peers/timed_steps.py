"""Seconds of an experiment's training steps on the devices that are here, and the
kernels that a GPU ran in them."""

import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np

from jaxinfra import experiment
from jaxinfra.data import packing
from jaxinfra.train import facts


def measured(
    built: experiment.Experiment, *, warmup: int, steps: int, rounds: int
) -> dict[str, Any]:
    """Of full rows of random tokens, one document each, `rounds` times `steps` steps,
    sent without waiting, as the loop does: median seconds a step and their spread,
    tokens a second, MFU, the process's peak of memory once the state was made and at
    the end; losses of the first step, after the warm-up (at least two steps) and after
    each round."""
    devices = list(built.layout.mesh.devices.flat)
    train = built.config.train
    tokens = train.batch_size * train.length
    flops = built.task.flops_per_row * train.batch_size
    peak_bytes = lambda: (devices[0].memory_stats() or {}).get("peak_bytes_in_use")
    with jax.set_mesh(built.layout.mesh):
        batch, state = _batch(built), jax.block_until_ready(built.init())
        init_peak_bytes, begin = peak_bytes(), time.perf_counter()
        state, metrics = built.train_step(state, batch)
        losses, secs = [float(metrics["loss"])], []
        compile_secs = time.perf_counter() - begin
        for count in (warmup - 1, *[steps] * rounds):
            begin = time.perf_counter()
            for _ in range(count):
                state, metrics = built.train_step(state, batch)
            losses.append(float(metrics["loss"]))
            secs.append((time.perf_counter() - begin) / count)
    step_secs, peak = statistics.median(secs[1:]), facts.peak_flops(devices[0])
    return {
        "device": devices[0].device_kind,
        "jax": jax.__version__,
        "secs": step_secs,
        "spread": max(secs[1:]) / min(secs[1:]) - 1,
        "tokens_per_sec": tokens / step_secs,
        "mfu": peak and flops / step_secs / (peak * len(devices)),
        "init_peak_bytes": init_peak_bytes,
        "peak_bytes": peak_bytes(),
        "compile_secs": compile_secs,
        "losses": losses,
    }


def kernels(built: experiment.Experiment, *, steps: int) -> dict[str, list[float]]:
    """Name of each kernel of a GPU -> [milliseconds, calls] a step, the dearest first,
    as the profiler saw them in `steps` steps."""
    with jax.set_mesh(built.layout.mesh), tempfile.TemporaryDirectory() as folder:
        batch, state = _batch(built), built.init()
        state, _ = built.train_step(state, batch)
        jax.block_until_ready(state)
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, _ = built.train_step(state, batch)
            jax.block_until_ready(state)
        [written] = pathlib.Path(folder).rglob("*.xplane.pb")
        seen = jax.profiler.ProfileData.from_file(str(written))
    sums: dict[str, list[float]] = {}
    for plane in seen.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                one = sums.setdefault(event.name, [0.0, 0.0])
                one[0] += event.duration_ns / 1e6 / steps
                one[1] += 1 / steps
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def _batch(built: experiment.Experiment) -> packing.Batch:
    config, place = built.config, experiment.batch_sharding(built.layout)
    rows, length = config.train.batch_size, config.train.length
    vocab_size = config.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1))
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    return packing.Batch(
        jax.device_put(tokens.astype(dtype), place),
        jax.device_put(np.full((rows, 1), length + 1, np.uint16), place),
    )
