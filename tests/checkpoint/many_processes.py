"""One process of several: saves with the others, or restores and compares.

python many_processes.py RANK SIZE PORT FOLDER save|restore MESH; MESH is as
fsdp=2,tensor=2. Prints `rank R: ` and what it wrote, or how many arrays are the same.
"""

import os
import pathlib
import sys

import jax
import numpy as np
import small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.checkpoint import lifecycle, processes, restore, store

SPECS = {
    "params/embedding": (("fsdp", "tensor"), None),
    "params/query": ("fsdp", "tensor"),
    "opt/nu": (None, "tensor"),
    "opt/whole": (None, None),
    "opt/scale": (None,),
    "opt/count": (),
}


def make_values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"params/embedding": (16, 3), "params/query": (8, 12), "opt/nu": (5, 8)}
    shapes |= {"opt/whole": (6, 4), "opt/scale": (7,), "opt/count": ()}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def main(rank: int, size: int, port: str, folder: pathlib.Path, verb: str, mesh: str):
    if size > 1:
        address = f"127.0.0.1:{port}"
        jax.distributed.initialize(
            address,
            size,
            rank,
            cluster_detection_method="deactivate",
            coordinator_bind_address=address,
        )
    sizes = {axis: int(n) for axis, n in (part.split("=") for part in mesh.split(","))}
    grid = small_state.make_mesh(**sizes)
    arrays = {
        name: jax.make_array_from_callback(
            value.shape, NamedSharding(grid, P(*SPECS[name])), value.__getitem__
        )
        for name, value in make_values().items()
    }
    group = processes.this_job(timeout_secs=60)
    if verb == "save":
        write, wrote = store.write_arrays, []

        def noted(*args):
            digests = write(*args)
            wrote.extend(name for name, paths in digests.items() if paths)
            return digests

        store.write_arrays = noted
        saves = lifecycle.Checkpointer(
            folder, keep=1, run_id="many", attempt=1, process=group
        )
        for step in (1, 2):  # the second reads itself back and deletes the first
            saves.save(step, arrays, metadata=small_state.METADATA)
            saves.wait()
        saves.close()
        print(f"rank {rank}:", len(wrote), flush=True)
        return
    abstract = small_state.abstract_of(arrays)
    found = restore.restore_latest(folder, abstract, process=group)
    same = [
        found.arrays[name].sharding == array.sharding
        and all(
            np.array_equal(shard.data, make_values()[name][shard.index])
            for shard in found.arrays[name].addressable_shards
        )
        for name, array in arrays.items()
    ]
    print(f"rank {rank}:", found.step, sum(same), flush=True)


if __name__ == "__main__":
    rank, size, port, folder, verb, mesh = sys.argv[1:]
    main(int(rank), int(size), port, pathlib.Path(folder), verb, mesh)
    if int(size) > 1:
        jax.distributed.shutdown()
    sys.stdout.flush()
    os._exit(0)
