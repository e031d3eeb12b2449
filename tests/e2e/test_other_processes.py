"""Saved by four processes, gone on with by one, two and four, on other meshes."""

import contextlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_state
from e2e import command
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.checkpoint import checking, partial

pytestmark = pytest.mark.slow
SAVED, STEPS = 4, 8
# Of a loss, relative: sums over other numbers of devices, in float32, some steps on.
OTHER_ORDER = 1e-6
CASES = {
    "4 processes, fsdp 2 x tensor 2": (4, {"fsdp": 2, "tensor": 2}),
    "2 processes, data 2": (2, {"data": 2}),
    "1 process, tensor 2": (1, {"tensor": 2}),
    "1 process, fsdp 4": (1, {"fsdp": 4}),
}


def job(run_dir, cache, processes, mesh, steps):
    """A job of so many processes to its end."""
    devices = int(np.prod(list(mesh.values()))) // processes
    settings = {"mesh.data": 1} | {f"mesh.{axis}": n for axis, n in mesh.items()}
    settings |= {"train.steps": steps, "train.save_every": SAVED}
    settings |= {"run.dir": run_dir, "runtime.cpu_devices": devices} | cache
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        settings |= {"runtime.coordinator": address}
        settings |= {"runtime.num_processes": processes}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                command.SCRIPT,
                *command.arguments(settings | {"runtime.process_id": rank}),
            ],
            env=command.environment(),
            cwd=command.ROOT,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=command.TIMEOUT_SECS)
            assert rank.returncode == 0, errors[-3_000:]
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.kill()


@pytest.fixture(scope="module")
def saved(cache, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("four") / "run"
    job(run_dir, cache, *CASES["4 processes, fsdp 2 x tensor 2"], SAVED)
    return run_dir


@pytest.fixture(scope="module")
def gone_on(saved, cache, tmp_path_factory):
    """History after the save of a run that goes on as it was saved."""
    run_dir = tmp_path_factory.mktemp("same") / "run"
    shutil.copytree(saved, run_dir)
    job(run_dir, cache, *CASES["4 processes, fsdp 2 x tensor 2"], STEPS)
    return command.history(run_dir)


@pytest.mark.parametrize("case", list(CASES)[1:])
def test_another_number_of_processes_goes_on_with_the_same_losses(
    case, saved, gone_on, cache, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(saved, run_dir)
    job(run_dir, cache, *CASES[case], STEPS)
    found = command.history(run_dir)
    assert [line[0] for line in found] == list(range(1, STEPS + 1))
    assert found[:SAVED] == gone_on[:SAVED]
    assert [line[3] for line in found] == [line[3] for line in gone_on]
    np.testing.assert_allclose(
        [line[1] for line in found], [line[1] for line in gone_on], rtol=OTHER_ORDER
    )


def test_all_four_wrote_and_every_mesh_reads_the_same_bits(saved):
    folder = saved / "checkpoints"
    assert checking.validate(folder / str(SAVED)) == []
    values: dict[str, bytes] = {}
    for sizes in (
        {},
        {"data": 8},
        {"fsdp": 4},
        {"tensor": 2},
        {"fsdp": 2, "tensor": 4},
    ):
        mesh = small_state.make_mesh(**sizes)

        def place(name, shape, mesh=mesh):
            axes = [axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1]
            fits = [
                axis if size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape)
            ]
            return NamedSharding(mesh, P(*fits))

        found = partial.restore_part(folder, "", sharding=place)
        bits = {name: jax.device_get(x).tobytes() for name, x in found.arrays.items()}
        values = values or bits
        assert bits == values
