"""Two real processes save, fail and restore as one; a third restores alone."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.checkpoint import checking, restore


def test_two_processes_save_together_and_one_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = small_state.ROOT / "tests/checkpoint/two_processes.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(port), str(tmp_path / "two")],
            env={**os.environ, "PYTHONPATH": str(small_state.ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank, process in enumerate(ranks):
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        assert out.splitlines() == [
            f"rank {rank}: saved [1]",
            f"rank {rank}: saved [2]",
            (
                f"rank {rank}: told: save of step 3 failed: rank 1: OSError: "
                "[Errno 5] Input/output error"
            ),
            f"rank {rank}: saved [4]",
            f"rank {rank}: restored 4 []",
            f"rank {rank}: restored 2 [4]",
            f"rank {rank}: restored 1 [4, 2]",
            f"rank {rank}: none usable",
        ]
    path = tmp_path / "two/1/arrays/params/embedding/c/0/0"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert checking.validate(tmp_path / "two/1") == []
    one_device = NamedSharding(small_state.make_mesh(), P())
    abstract = {
        "params/embedding": jax.ShapeDtypeStruct(
            (17, 3), np.float32, sharding=one_device
        )
    }
    found = restore.restore(tmp_path / "two", 1, abstract)
    wanted = np.arange(17 * 3, dtype=np.float32).reshape(17, 3)
    np.testing.assert_array_equal(found.arrays["params/embedding"], wanted)
