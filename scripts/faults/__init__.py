"""The fault table: what is broken on purpose, how often, and what must hold then.

    python scripts/bench.py faults              a share of every row, about 15 minutes
    python scripts/bench.py faults --full       every row N times
    python scripts/bench.py faults --rows 1,6 --minutes 5

A row is a function of a trial's number; the number is the seed, so a trial that failed
can be run again alone. Verdicts go to a ledger, a line each, as they come: a table that
was interrupted goes on, and `--full` counts what the sample has done.

| file | rows | what is broken |
|---|---|---|
| `kills` | 1, 15, 23, loop | whole runs, by signals at any moment |
| `owners` | 37 | two runs that want one folder |
| `saves` | 2, 3, 4, 5, 10, 11, 13 | the disk beneath a save, by `shim.c` |
| `damage` | 6, 7, 8, 9, 24, 36, flip | bytes at rest: checkpoints, data, programs |
| `outage` | 12 | S3 behind a proxy that fails |
| `meshes` | 21, 22 | the mesh of the next start |
| `fuzz` | 25, 28 | metadata, headers, command lines |
| `hostile` | 29, 30 | files made to run code, or to lead elsewhere |
| `bombs` | 31 | files made to fill the memory |
| `canaries` | 32 | secrets in the environment and in URLs |

How: `table` starts `worker`s with the shim loaded; a worker imports jax once and forks
a child for every trial (`rig`), so that a kill costs no import. A forked run calls
`scripts/train.py`'s `main` with the words of a command line; it is the command but for
the start of Python. The row `loop` starts the command itself.
"""
