"""The processes of a job, found by the environment variables that launchers set.

One row of `LAUNCHERS` for each launcher: the variables that give it away, and what is
read from them. The first row that fits is taken. Nothing is asked over the network.
"""

import dataclasses
import re
import socket
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxinfra.config import Config, ConfigError

Environment = Mapping[str, str]

PORT = 8476  # of the coordinator, where nothing tells two jobs on a host apart
_PORTS = 4096  # from the top: the port of a job that has a number


class Job(NamedTuple):
    """This process among those of its job.

    coordinator: host:port of process 0. local_id: its number on its host, where several
    share one; None: it has the host's devices for itself.
    """

    launcher: str
    coordinator: str
    num_processes: int
    process_id: int
    local_id: int | None = None


class Launcher(NamedTuple):
    """signs: variables of which all must be set."""

    name: str
    signs: tuple[str, ...]
    read: Callable[[Environment], Job]


def find_job(environment: Environment) -> Job | None:
    """The job that this process is part of; None if it is alone.

    Raises ConfigError where a launcher's variables cannot be read.
    """
    for launcher in LAUNCHERS:
        if not all(environment.get(sign) for sign in launcher.signs):
            continue
        try:
            job = launcher.read(environment)
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            shown = ", ".join(f"{s}={environment.get(s)!r}" for s in launcher.signs)
            raise ConfigError(
                f"this looks like a job of {launcher.name}, but its environment cannot"
                f" be read ({error}): {shown}; set runtime.coordinator,"
                " runtime.num_processes and runtime.process_id, or runtime.discover to"
                " false"
            ) from error
        if not 0 <= job.process_id < job.num_processes:
            raise ConfigError(
                f"{launcher.name} says that this is process {job.process_id} of"
                f" {job.num_processes}; set runtime.process_id and"
                " runtime.num_processes, or runtime.discover to false"
            )
        return job if job.num_processes > 1 else None
    return None


def with_job(config: Config, job: Job) -> Config:
    """`config` with the processes of `job`, where it states none itself."""
    runtime = config.runtime
    is_stated = runtime.coordinator or runtime.num_processes > 1
    if is_stated or not runtime.discover:
        return config
    found = dataclasses.replace(
        runtime,
        coordinator=job.coordinator,
        num_processes=job.num_processes,
        process_id=job.process_id,
    )
    return dataclasses.replace(config, runtime=found)


def _slurm(env: Environment) -> Job:
    host = first_host(env["SLURM_STEP_NODELIST"])
    num_processes = int(env["SLURM_STEP_NUM_TASKS"])
    is_shared = num_processes > int(env.get("SLURM_STEP_NUM_NODES", num_processes))
    return Job(
        "slurm",
        f"{host}:{_port(int(env['SLURM_JOB_ID']))}",
        num_processes,
        int(env["SLURM_PROCID"]),
        int(env["SLURM_LOCALID"]) if is_shared else None,
    )


def _openmpi(env: Environment) -> Job:
    """mpirun's host leads, of which version 4 tells, or MASTER_ADDR, where process 0 is
    on another; version 5 needs that."""
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    if env.get("MASTER_ADDR"):
        coordinator = f"{env['MASTER_ADDR']}:{env.get('MASTER_PORT') or PORT}"
    elif found:
        number = int(found[1]) >> 12  # it is a multiple of 4096
        coordinator = f"{found[2] or f'[{found[3]}]'}:{_port(number)}"
    else:
        raise ValueError("mpirun -x MASTER_ADDR=HOST must name the host of process 0")
    is_shared = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")) > 1
    return Job(
        "openmpi",
        coordinator,
        int(env["OMPI_COMM_WORLD_SIZE"]),
        int(env["OMPI_COMM_WORLD_RANK"]),
        int(env["OMPI_COMM_WORLD_LOCAL_RANK"]) if is_shared else None,
    )


def _gke_tpu(env: Environment) -> Job:
    """Workers of a slice are listed; of several slices the first one's first leads."""
    workers = env["TPU_WORKER_HOSTNAMES"].split(",")
    slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
    leader = env.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    before = int(env.get("MEGASCALE_SLICE_ID") or 0) * len(workers)
    return Job(
        "gke-tpu",
        f"{leader.strip().partition(':')[0]}:{PORT}",
        slices * len(workers),
        before + int(env["TPU_WORKER_ID"]),
    )


def _stated(name: str, index: str) -> Callable[[Environment], Job]:
    def read(env: Environment) -> Job:
        return Job(
            name,
            _with_port(env["JAX_COORDINATOR_ADDRESS"]),
            int(env["JAX_NUM_PROCESSES"]),
            int(env[index]),
        )

    return read


def _torchrun(env: Environment) -> Job:
    is_shared = int(env.get("LOCAL_WORLD_SIZE", "1")) > 1
    return Job(
        "torchrun",
        f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}",
        int(env["WORLD_SIZE"]),
        int(env["RANK"]),
        int(env["LOCAL_RANK"]) if is_shared else None,
    )


def _host_list(env: Environment) -> Job:
    hosts = [host.strip() for host in env["JAXINFRA_HOSTS"].split(",")]
    if env.get("JAXINFRA_HOST_INDEX"):
        index = int(env["JAXINFRA_HOST_INDEX"])
    else:
        names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
        here = [i for i, host in enumerate(hosts) if host.partition(":")[0] in names]
        if len(here) != 1:
            raise ValueError(
                f"{socket.gethostname()} is {len(here)} times in JAXINFRA_HOSTS; list"
                " it once, or set JAXINFRA_HOST_INDEX, from 0, on every host"
            )
        index = here[0]
    return Job("hosts", _with_port(hosts[0]), len(hosts), index)


LAUNCHERS = (
    Launcher("hosts", ("JAXINFRA_HOSTS",), _host_list),
    Launcher(
        "jax",
        ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
        _stated("jax", "JAX_PROCESS_ID"),
    ),
    Launcher(
        "kubernetes",
        ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"),
        _stated("kubernetes", "JOB_COMPLETION_INDEX"),
    ),
    Launcher("gke-tpu", ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"), _gke_tpu),
    # Before slurm: mpirun within an allocation of it sets both.
    Launcher("openmpi", ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), _openmpi),
    Launcher(
        "slurm",
        # Of a step, which srun makes: a shell in an allocation has no number.
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        _slurm,
    ),
    Launcher(
        "torchrun", ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"), _torchrun
    ),
)


def first_host(node_list: str) -> str:
    """The first of hosts as Slurm lists them: node001 of 'node[001-003,007],gpu4'."""
    prefix, numbers, suffix = re.match(
        r"([^\[,]+)(?:\[([^\]]+)\]([^,\[]*))?", node_list
    ).groups()
    return prefix + re.split("[,-]", numbers)[0] + suffix if numbers else prefix


def _port(number: int) -> int:
    return 65536 - _PORTS + number % _PORTS


def _with_port(address: str) -> str:
    is_bare = re.fullmatch(r"[^:\[\]]+|\[[^\]]+\]", address)
    return f"{address}:{PORT}" if is_bare else address
