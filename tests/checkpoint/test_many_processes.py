"""Four real processes save, sharing the work; one, two and four restore."""

import os
import socket
import subprocess
import sys

import jax
import many_processes
import numpy as np
import pytest
import small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.checkpoint import checking, commits, partial

pytestmark = pytest.mark.slow


def job(folder, verb, size, mesh) -> list[list[int]]:
    """The numbers that each rank printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = small_state.ROOT / "tests/checkpoint/many_processes.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(size), port, folder, verb, mesh],
            env={
                **os.environ,
                "PYTHONPATH": str(small_state.ROOT),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    told = []
    for rank, process in enumerate(ranks):
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3_000:]
        assert out.startswith(f"rank {rank}: ")
        told.append([int(word) for word in out.split(": ")[1].split()])
    return told


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "checkpoints"
    wrote = job(folder, "save", 4, "fsdp=2,tensor=2")
    assert min(wrote) >= [2], "every process writes a part, of replicated arrays too"
    return folder


@pytest.mark.parametrize(
    ("size", "mesh"),
    [(4, "fsdp=4"), (4, "data=4"), (2, "tensor=2"), (2, "data=2"), (1, "fsdp=1")],
)
def test_another_number_of_processes_restores_the_same_bits(size, mesh, saved):
    num_arrays = len(many_processes.SPECS)
    assert job(saved, "restore", size, mesh) == [[2, num_arrays]] * size


def test_this_process_reads_the_same_bits_on_any_mesh(saved):
    assert checking.validate(saved / "2") == []
    assert [step for step, _ in commits.step_folders(saved)] == [2]
    for sizes in ({}, {"data": 8}, {"fsdp": 4, "tensor": 2}):
        place = NamedSharding(small_state.make_mesh(**sizes), P())
        found = partial.restore_part(saved, "", sharding=place)
        for name, value in many_processes.make_values().items():
            assert jax.device_get(found.arrays[name]).tobytes() == value.tobytes()
            assert np.shape(value) == found.arrays[name].shape
