"""Checkpoints: committed or not there, and every byte read back is checked.

A checkpoint is a flat mapping from names such as `params/pattern/0/query` to
global `jax.Array`s, plus a configuration and a data state in JSON. On disk:

    RUN/checkpoints/<step>/manifest.json            written last
    RUN/checkpoints/<step>/arrays/<name>/zarr.json  for other readers; not used here
    RUN/checkpoints/<step>/arrays/<name>/c/1/0      a chunk: bytes + crc32c, zarr3

A save in one picture (`lifecycle`, the file to read first):

    train loop   | snapshot | step n+1, n+2, ...            | poll() -> SaveReport
    every rank              \\ chunks, fsync, digests \\
    rank 0                                             \\ manifest, fsync, rename

It is written under `<step>.<attempt>.writing`, and the rename to `<step>` commits
it. So `<step>` is whole or absent, and whatever is wrong with it later is damage:
found by size or digest, reported, and answered by walking back one step.

| file | subject |
|---|---|
| `lifecycle` | when: a save behind the training loop, agreed by all processes |
| `restore` | which step to go on from, and its arrays on any mesh |
| `snapshot` | device arrays to host copies, before the next step donates them |
| `store` | chunk files: write one's own shards, read what a mesh needs |
| `commits` | folders of steps: begun, committed, deleted; errors; needs no jax |
| `integrity` | the manifest, and every file's size and digest; needs no jax |
| `look` | what a step holds, what two have different (`scripts/checkpoint.py`) |
| `processes` | agreement of several processes; the one private jax import |

What each of these promises has been put to: `scripts/bench.py faults`, whose table is
`scripts/results/faults.md`. `scripts/checkpoint.py` lists, verifies, shows, compares
and prunes steps, and moves them to Orbax or safetensors and back
(`interop.checkpoints`).

This package imports nothing when imported: take the modules by name.
"""
