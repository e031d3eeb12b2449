"""Jobs of every launcher, by the variables that it sets."""

import dataclasses
import socket

import pytest

from jaxinfra import options
from jaxinfra.config import ConfigError
from jaxinfra.launch import discovery
from jaxinfra.launch.discovery import Job

SLURM = {
    "SLURM_JOB_ID": "5001",
    "SLURM_STEP_NODELIST": "node[001,007-015],host2",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_NUM_NODES": "11",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "11",
}
OPENMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
GKE = {"TPU_WORKER_HOSTNAMES": "t-0.s,t-1.s", "TPU_WORKER_ID": "1"}
STATED = {"JAX_COORDINATOR_ADDRESS": "train-0.train:1234", "JAX_NUM_PROCESSES": "4"}
TORCHRUN = {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "16",
    "RANK": "9",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
}
FOUND = [
    ({}, None),
    (SLURM, Job("slurm", "node001:62345", 11, 3)),
    (
        SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "3"},
        Job("slurm", "node001:62345", 11, 3, 3),
    ),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    # A shell within an allocation: no step, so no number.
    ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_NODELIST": "a"}, None),
    (OPENMPI, Job("openmpi", "10.96.0.1:62624", 4, 2, 0)),
    (
        OPENMPI
        | {
            "OMPI_MCA_orte_hnp_uri": "8192.0;tcp6://[fe80::1,26::2]:4",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        },
        Job("openmpi", "[fe80::1]:61442", 4, 2),
    ),
    (
        {k: v for k, v in OPENMPI.items() if "orte" not in k} | {"MASTER_ADDR": "n"},
        Job("openmpi", "n:8476", 4, 2, 0),
    ),
    (SLURM | OPENMPI, Job("openmpi", "10.96.0.1:62624", 4, 2, 0)),
    (GKE, Job("gke-tpu", "t-0.s:8476", 2, 1)),
    (GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    (
        GKE
        | {
            "MEGASCALE_NUM_SLICES": "3",
            "MEGASCALE_SLICE_ID": "2",
            "MEGASCALE_COORDINATOR_ADDRESS": "set-0-0.set:8080",
        },
        Job("gke-tpu", "set-0-0.set:8476", 6, 5),
    ),
    (
        STATED | {"JOB_COMPLETION_INDEX": "3"},
        Job("kubernetes", "train-0.train:1234", 4, 3),
    ),
    (
        STATED | {"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a"},
        Job("jax", "a:8476", 4, 0),
    ),
    # A pod of an indexed Job that was told of no other pod is alone.
    ({"JOB_COMPLETION_INDEX": "3"}, None),
    (TORCHRUN, Job("torchrun", "10.0.0.1:29500", 16, 9, 1)),
    (
        {"JAXINFRA_HOSTS": "a:77, b,c", "JAXINFRA_HOST_INDEX": "2"},
        Job("hosts", "a:77", 3, 2),
    ),
    (
        {"JAXINFRA_HOSTS": f"other,{socket.gethostname()}"},
        Job("hosts", "other:8476", 2, 1),
    ),
]


@pytest.mark.parametrize(("environment", "expected"), FOUND)
def test_a_job_is_known_by_what_its_launcher_sets(environment, expected):
    assert discovery.find_job(environment) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("a-b[07]-ib,c", "a-b07-ib"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert discovery.first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        (SLURM | {"SLURM_PROCID": "eleven"}, ["slurm", "SLURM_PROCID='eleven'"]),
        (SLURM | {"SLURM_PROCID": "11"}, ["process 11 of 11", "runtime.process_id"]),
        (OPENMPI | {"OMPI_MCA_orte_hnp_uri": ""}, ["openmpi", "MASTER_ADDR"]),
        ({"JAXINFRA_HOSTS": "a,b"}, ["0 times in JAXINFRA_HOSTS", "HOST_INDEX"]),
    ],
)
def test_what_cannot_be_read_says_what_to_set(environment, parts):
    with pytest.raises(ConfigError) as error:
        discovery.find_job(environment)
    assert all(part in str(error.value) for part in parts), error.value


def test_what_the_command_states_comes_first():
    config, job = options.load_config("tiny"), Job("slurm", "a:1", 4, 3)
    found = discovery.with_job(config, job).runtime
    assert (found.coordinator, found.num_processes, found.process_id) == ("a:1", 4, 3)

    def with_runtime(**settings):
        runtime = dataclasses.replace(config.runtime, **settings)
        return dataclasses.replace(config, runtime=runtime)

    stated = with_runtime(coordinator="b:2", num_processes=2)
    assert discovery.with_job(stated, job) == stated
    alone = with_runtime(discover=False)
    assert discovery.with_job(alone, job) == alone
