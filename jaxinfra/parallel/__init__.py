"""What is split by hand: experts, context, pipeline.

Everything else is sharding by type (`sharding`); these enter by the seam (`ops.seam`)
or as a `GradFn`, and no model knows of them.

| file | subject |
|---|---|
| `expert` | tokens go to the devices of their experts and come back |

**Experts.** `--mesh.expert P` gives each device E / P experts, and splits the rows of a
batch as `data` does. A token's router, always float32, runs where the token is. Without
`model.capacity_factor` no token is dropped (`dropless`): rows are grouped by expert,
exchanged by one ragged all-to-all and multiplied by a grouped matmul; the buffer that
receives them must have room for the worst case, in which all tokens go to one device.
With it an expert takes `capacity_factor` times its even share of each row, in order of
position, through buffers of fixed size and a plain all-to-all; a token that finds no
room keeps what its other experts give. `--parallel.experts dense` computes every expert
on every token instead and is the oracle of both.

Balance, z and capacity are defined for one row, then averaged over rows by their
numbers of targets. So `--mesh.*`, `--train.microbatches` and stages change no number.
"""
