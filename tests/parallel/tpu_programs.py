"""Run as a program where libtpu is: compiles a training step for TPUs not here.

    python tpu_programs.py ring|all_gather|dropless|bounded

Prints one JSON object: how often the compiled program has each kind of operation, and
its bytes. Compiles for v5p 2x2x2 and runs nothing.
"""

import collections
import json
import os
import re
import sys

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

KINDS = {
    "ring": ("dense", {"fsdp": 2, "context": 4}),
    "all_gather": ("dense", {"fsdp": 2, "context": 4}),
    "dropless": ("experts", {"fsdp": 2, "expert": 4}),
    "bounded": ("experts", {"fsdp": 2, "expert": 4}),
}


def main(kind):
    import jax
    import numpy as np
    from jax.experimental import topologies

    from jaxinfra import config as c
    from jaxinfra import experiment
    from jaxinfra.data import packing

    layer, mesh = KINDS[kind]
    config = c.Config(
        name="compiled",
        precision="bfloat16",
        model=c.ModelConfig(
            vocab_size=512,
            width=512,
            ffn_width=1024,
            num_heads=8,
            num_kv_heads=4,
            head_dim=128,
            pattern=(c.LayerConfig(feed_forward=layer),),
            repeats=2,
            num_experts=8,
            experts_per_token=2,
            capacity_factor=1.25 if kind == "bounded" else 0.0,
        ),
        train=c.TrainConfig(batch_size=16, length=2048, remat="full"),
        mesh=c.MeshConfig(data=1, **mesh),
        parallel=c.ParallelConfig(
            context="all_gather" if kind == "all_gather" else "ring"
        ),
    )
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5p:2x2x2"
    ).devices
    built = experiment.build(config, list(devices))
    with jax.set_mesh(built.layout.mesh):
        state = built.abstract()
        row = np.zeros((1, config.train.length + 1), np.uint16)
        batch = experiment.abstract_batch(built, packing.Batch(row, row[:, :4]))
        compiled = built.train_step.lower(state, batch).compile()
    found = collections.Counter(
        re.findall(r" = \S+ (?:\([^)]*\) )?([\w-]+)\(", compiled.as_text())
    )
    text = compiled.as_text()
    for name in ("splash", "gmm", "ragged"):
        found[f"named {name}"] = text.count(name)
    memory = compiled.memory_analysis()
    found["temporary_bytes"] = memory.temp_size_in_bytes
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
