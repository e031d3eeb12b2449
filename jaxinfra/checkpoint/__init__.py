"""Checkpoints: committed or not there, and every byte read back is checked.

A checkpoint is a flat mapping from names such as `params/pattern/0/query` to
global `jax.Array`s, plus a configuration and a data state in JSON. On disk:

    RUN/checkpoints/<step>/manifest.json            written last
    RUN/checkpoints/<step>/arrays/<name>/zarr.json  for other readers; not used here
    RUN/checkpoints/<step>/arrays/<name>/c/1/0      a chunk: bytes + crc32c, zarr3

A save in one picture (`lifecycle`, the file to read first):

    train loop   | snapshot | step n+1, n+2, ...                  | poll() -> SaveReport
    every rank              \\ chunks, fsync, digests \\    / read back
    rank 0                                             \\ commit \\ delete old steps

It is written under `<step>.<attempt>.writing`, and the rename to `<step>` commits
it; in an object store (`jaxinfra.remote`) the creation of its manifest does. So
`<step>` is whole or absent, and whatever is wrong with it later is damage: found by
size or digest, reported, and answered by walking back one step.

What a save costs the loop is the copy to the host. `checkpoint.staging_gib` bounds the
host memory that it takes, for a loop that waits while most of the state is written;
`checkpoint.defer_copies` takes device memory instead, and nothing of the loop's time.
Of devices that hold the same values each writes a part.

A save that fails is told at the next step, by the same words in every process, and the
next save tries again; a run whose last save failed ends by exit code 15. Metrics are
on disk before the step that they lead to is committed. A run that was taken over can
commit nothing more.

The newest `checkpoint.keep` steps stay; `keep_every`, `keep_best` and `keep_hours` say
which others do. None is deleted before all of the new one was read back.

| file | subject |
|---|---|
| `lifecycle` | when: a save behind the training loop, agreed by all processes |
| `restore` | which step to go on from, and its arrays on any mesh |
| `partial` | parameters alone, a subtree, another dtype |
| `snapshot`, `staging` | host copies, before the next step donates the arrays |
| `store`, `reading` | chunk files: write one's own share, read what a mesh needs |
| `commits` | folders of steps: begun, committed, fenced off, deleted; needs no jax |
| `integrity`, `checking` | the manifest; every file against it; need no jax |
| `read_back`, `retention` | before and which older steps are deleted |
| `look` | what a step holds, what two have different (`scripts/checkpoint.py`) |
| `processes` | agreement of several processes; the one private jax import |

What each of these promises has been put to: `scripts/bench.py faults`, whose table is
`scripts/results/faults.md`. `scripts/checkpoint.py` lists, verifies, shows, compares
and prunes steps, and moves them to Orbax or safetensors and back
(`interop.checkpoints`).
"""
