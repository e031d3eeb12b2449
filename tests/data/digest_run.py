"""Prints data/digest of each step of a mixed stream, as one process of a job sees it.

    python digest_run.py SETS MESH DEPTH START STOP [PORT COUNT RANK]

SETS: a folder of data sets, which are mixed by weights that change, with a batch that
rises. MESH: devices in all, rows over data x fsdp. DEPTH: of prefetch. PORT, COUNT and
RANK make it a process of a job.
"""

import contextlib
import os
import pathlib
import sys

LENGTH, BATCH_SIZE, RAMP = 64, 16, "8 16@60"
WEIGHTS = {"a": "0.5 0.2@40 1@150", "b": "0.3 0.6@40", "c": "0.2 0.2@90"}


def main(sets, mesh, depth, start, stop, port="", count="1", rank="0"):
    local = int(mesh) // int(count)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={local}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if port:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(rank))
    from jaxinfra.data import batches, device, digests, shards
    from jaxinfra.stages import BatchSizes, parse

    names = sorted(path.name for path in pathlib.Path(sets).iterdir())
    stream = batches.make_stream(
        {n: shards.open_dataset(f"{sets}/{n}").split("train") for n in names},
        length=LENGTH,
        batch_size=BATCH_SIZE,
        seed=5,
        ramp=RAMP,
        block=4,
        weights={name: parse(WEIGHTS[name], key=name) for name in names},
    )
    sizes = BatchSizes(BATCH_SIZE, RAMP)
    shape = (max(int(mesh) // 2, 1), 2 if int(mesh) > 1 else 1)
    grid = jax.make_mesh(
        shape, ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    rows = jax.NamedSharding(grid, jax.P(("data", "fsdp"), None))

    def fetch(step):
        return device.to_device(
            stream.batch, step, batch_size=sizes.of(step), sharding=rows
        )

    digest = jax.jit(digests.digest, out_shardings=jax.NamedSharding(grid, jax.P()))
    fetched = device.prefetch(fetch, int(start), int(stop), depth=int(depth))
    with jax.set_mesh(grid), contextlib.closing(fetched):
        for batch in fetched:
            print(int(digest(batch.batch)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
