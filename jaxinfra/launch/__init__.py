"""How a run finds the machines that it is on; free of jax.

| file | subject |
|---|---|
| `discovery` | the processes of a job, recognised by what their launcher sets |

A command that `srun`, `mpirun`, an indexed Kubernetes Job or GKE starts on several
machines needs no option: every process reads its number, the count and the address of
the first from its environment. `--runtime.coordinator`, `--runtime.num_processes` and
`--runtime.process_id` take precedence, and `--runtime.discover false` looks for
nothing. An indexed Job knows its pods' numbers alone, so its manifest names the rest:

    env:
    - {name: JAX_NUM_PROCESSES, value: "4"}                  # spec.completions
    - {name: JAX_COORDINATOR_ADDRESS, value: train-0.train:1234}  # job-0.subdomain

Without a launcher, the same list of hosts on each of them is enough:
`JAXINFRA_HOSTS=node1,node2 python scripts/train.py ...`; the first is the coordinator.
"""
