"""Run as a program: lowers the training step of a config on simulated devices.

    python lower_step.py NAME

Prints one JSON object: seconds to build and to lower, devices, sizes of the mesh, and
what the lowered program shows of donation and shardings. Compiles and allocates
nothing.
"""

import json
import math
import os
import sys
import time


def main(name):
    from jaxinfra import options
    from jaxinfra.config import AXES

    config = options.load_config(name)
    sizes = {axis: max(1, getattr(config.mesh, axis)) for axis in AXES}
    count = math.prod(sizes.values())
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np

    from jaxinfra import experiment
    from jaxinfra.data import packing
    from jaxinfra.data.tokenizer import ByteTokenizer

    jax.devices()
    started_secs = time.perf_counter()
    vocab_size = 0 if config.model.vocab_size else ByteTokenizer().vocab_size
    built = experiment.build(experiment.resolve(config, vocab_size))
    with jax.set_mesh(built.layout.mesh):
        state = built.abstract()
        row = np.zeros((1, config.train.length + 1), np.uint32)
        rows = packing.Batch(row, row[:, :4].astype(np.uint16))
        batch = experiment.abstract_batch(built, rows)
        traced = built.train_step.trace(state, batch)
        lowered = traced.lower()
    secs = time.perf_counter() - started_secs
    text = lowered.as_text()
    axes = {
        axis
        for leaf in jax.tree.leaves(state.params)
        for entry in leaf.sharding.spec
        for axis in ((entry,) if isinstance(entry, str) else entry or ())
    }
    new_state, _ = lowered.out_info
    same = jax.tree.map(
        lambda new, old: (
            (new.shape, new.dtype) == (old.shape, old.dtype)
            and new.sharding.is_equivalent_to(old.sharding, old.ndim)
        ),
        new_state,
        state,
    )
    report = {
        "secs": secs,
        "devices": built.layout.mesh.size,
        "explicit": all("Explicit" in str(t) for t in built.layout.mesh.axis_types),
        "params_split_over": sorted(axes),
        "leaves": len(jax.tree.leaves(state)),
        "donated": text.count("jax.buffer_donor") + text.count("tf.aliasing_output"),
        "state_keeps_its_layout": all(jax.tree.leaves(same)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
