"""A step of configs/tiny_moe.py by each way that tokens meet their experts, and of the
dense model that has as many FLOPs a token, in turn."""

import dataclasses
import statistics
import time

import jax
import numpy as np

from jaxinfra import experiment, options
from jaxinfra.config import LayerConfig
from jaxinfra.data import packing

WAYS = {
    "dense": {"experts": "dense"},
    "dropless": {"experts": "dropless"},
    "bounded": {"experts": "dropless", "capacity_factor": 1.25},
}


def report(repeats: int) -> dict:
    """Seconds a step, and the median of ratios to every expert on every token."""
    base = options.load_config("tiny_moe")
    model = dataclasses.replace(base.model, vocab_size=257)
    base = dataclasses.replace(base, model=model)
    configs = {name: _by(base, **way) for name, way in WAYS.items()}
    # Two experts of 192 are one feed-forward of 384.
    layers = (LayerConfig(),) * len(model.pattern)
    plain = dataclasses.replace(
        model, pattern=layers, num_experts=0, experts_per_token=0, ffn_width=384
    )
    configs["no experts"] = dataclasses.replace(base, model=plain)
    runs = {name: _run(config) for name, config in configs.items()}
    secs: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn:  # the first compiles
                secs[name].append(time.perf_counter() - begin)
    result: dict = {
        f"{name.replace(' ', '_')}_secs": statistics.median(values)
        for name, values in secs.items()
    }
    for name in ("dropless", "bounded", "no experts"):
        pairs = zip(secs[name], secs["dense"], strict=True)
        key = f"{name.replace(' ', '_')}_over_dense"
        result[key] = statistics.median(own / dense for own, dense in pairs)
    return result


def _by(base, *, experts, capacity_factor=0.0):
    return dataclasses.replace(
        base,
        parallel=dataclasses.replace(base.parallel, experts=experts),
        model=dataclasses.replace(base.model, capacity_factor=capacity_factor),
    )


def _run(config):
    """A function that makes a step and waits for it."""
    built = experiment.build(config, jax.devices()[:1])
    with jax.set_mesh(built.layout.mesh):
        place = experiment.batch_sharding(built.layout)
        rows, width = config.train.batch_size, config.train.length + 1
        tokens = np.random.default_rng(0).integers(0, 256, (rows, width))
        batch = packing.Batch(
            jax.device_put(tokens.astype(np.uint16), place),
            jax.device_put(np.full((rows, 1), width, np.uint16), place),
        )
        state = built.init()

    def run():
        nonlocal state
        with jax.set_mesh(built.layout.mesh):
            state, metrics = built.train_step(state, batch)
            jax.block_until_ready((state, metrics))

    return run
