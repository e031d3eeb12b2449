"""One process of two: saves together, fails together, restores together.

python two_processes.py RANK PORT FOLDER; prints lines that start with `rank`.
"""

import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import numpy as np
import small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.checkpoint import lifecycle, processes, restore, store
from jaxinfra.checkpoint.commits import NoUsableCheckpoint, SaveError


def main(rank: int, port: str, folder: pathlib.Path) -> None:
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address,
        2,
        rank,
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        heartbeat_timeout_seconds=10,
    )
    say = lambda *words: print(f"rank {rank}:", *words, flush=True)
    mesh = small_state.make_mesh(fsdp=2, tensor=2)
    shardings = {
        "params/embedding": NamedSharding(mesh, P(("fsdp", "tensor"))),
        "opt/nu": NamedSharding(mesh, P(None, "tensor")),
        "opt/count": NamedSharding(mesh, P()),
    }
    values = {
        "params/embedding": np.arange(20 * 3, dtype=np.float32).reshape(20, 3),
        "opt/nu": np.arange(16, dtype=np.float32).reshape(4, 4),
        "opt/count": np.array(5, np.int32),
    }
    arrays = {
        name: jax.make_array_from_callback(
            value.shape, shardings[name], value.__getitem__
        )
        for name, value in values.items()
    }
    about = {
        "metadata": small_state.METADATA,
        "logical_shapes": {"params/embedding": (17, 3)},
    }
    group = processes.this_job(timeout_secs=20)
    saves = lifecycle.Checkpointer(
        folder, keep=3, run_id="two", attempt=1, process=group
    )
    for step in (1, 2):
        saves.save(step, arrays, **about)
        say("saved", [report.step for report in saves.wait()])

    if rank == 1:
        plain, store.write_arrays = store.write_arrays, broken
    saves.save(3, arrays, **about)
    try:
        saves.wait()
    except SaveError as error:
        say("told:", error)
    if rank == 1:
        store.write_arrays = plain
    saves.save(4, arrays, **about)
    say("saved", [report.step for report in saves.close()])

    abstract = small_state.abstract_of(arrays)
    shapes = about["logical_shapes"]
    for step, chunk in ((4, "3/0"), (2, "0/0"), (1, "0/0")):
        found = restore.restore_latest(
            folder, abstract, logical_shapes=shapes, process=group
        )
        for name, array in found.arrays.items():
            for shard in array.addressable_shards:
                wanted = values[name].copy()
                if name == "params/embedding":
                    wanted[17:] = 0
                np.testing.assert_array_equal(shard.data, wanted[shard.index])
        say("restored", found.step, [step for step, _ in found.rejected])
        # Damage in a chunk that one of the two reads; then both must walk back.
        group.from_first(
            f"damage/{step}", lambda s=step, c=chunk: damage(folder / str(s), c)
        )
    try:
        restore.restore_latest(folder, abstract, logical_shapes=shapes, process=group)
    except NoUsableCheckpoint:
        say("none usable")


def broken(*args):
    raise OSError(5, "Input/output error")


def damage(step_folder: pathlib.Path, chunk: str) -> None:
    path = step_folder / "arrays/params/embedding/c" / chunk
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
    jax.distributed.shutdown()  # waits for the other: the first one is the coordinator
    os._exit(0)
