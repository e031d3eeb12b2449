"""What is split by hand: pipeline, experts, context.

Everything else is sharding by type (`sharding`); these enter by the seam (`ops.seam`)
or as a `GradFn`, and no model knows of them.

| file | subject |
|---|---|
| `schedules` | a schedule is a table tick x stage: made, checked, balanced, drawn |
| `lowering` | the same as rows of integers, and how much room each stage needs |
| `placement`, `travel` | which repeats each chunk of layers holds, how they travel |
| `pipeline`, `chunks`, `phases` | the executor, a stage, a layer cut in parts |
| `hops` | what goes from stage to stage |
| `expert` | tokens go to the devices of their experts and come back |
| `context` | attention over rows whose length is split; the balanced order |
| `ring`, `gathered` | keys that go round; keys that all come at once |
| `context_part` | what a device has of the rows, for both |
| `meeting` | a part of the queries meets a part of the keys: kernel, merger, gradient |
| `splash_parts`, `cudnn_parts` | the same by these kernels |

**Pipelines.** `--mesh.pipeline S` with `--parallel.schedule` gpipe, 1f1b, interleaved
(`--parallel.virtual_stages V`) or zero_bubble; a table of one's own runs as well. One
program walks any table; `train.pipelined` makes a `GradFn` of it, and a forward-only
`LossFn` for evaluation. Embedding and head belong to no stage: their vocabulary is
split over all. Repeats that do not divide are shared out as evenly as can be, prefix
and suffix counted. It composes with data, fsdp (every zero), expert, tensor and context
axes, float32, bfloat16 and float16, dropout, documents, unequal weights, tied tables.
What layers of experts tell the loss is summed over chunks as they run forward, and its
gradient joins that of the layer's result. A stage keeps what `train.remat` says of each
of its layers for all microbatches under way: by 1f1b 2 S - 1 of them on the first stage
and one on the last, and one program has room for the most on every device. So late
stages may keep a part for early ones (`--parallel.balanced`): while a stage runs its
passes, what an earlier pass kept goes to the partner, and as much comes back, and all
need room for S or so. By itself (auto) this is done with full remat or recompute, where
little travels: for Llama-3-70B on 64 v5p 0.3% of a planned step, for 8 GB; not where
slices split the pipeline. With 2 stages it would save nothing. `--parallel.recompute
true` keeps only what enters a stage, for one more forward pass. Of 80 layers in 8
stages, full remat, 32 microbatches, 1f1b takes 6.9 GB of temporaries (9.0 not balanced,
4.3 recomputed, with 26% more FLOPs of matmuls; gpipe 16.1; `scripts/bench.py
pipeline`). zero_bubble also leaves to the weight pass what the gradients of matrices
need, of up to S microbatches, which train.remat does not make less: 69 GB there. With
interleaved most repeats are not at home in their chunks: they travel there once a step,
as they are at rest, and their gradients back, and both are held twice: 24 GB there.
With zero 3 the parameters of a stage are gathered once a step and are whole meanwhile;
zero is 1 unless it is set. Over expert and context axes they are whole always, but for
the optimizer's state and the experts themselves. Refused (`compositions`): ring
attention, whose exchange all devices join while stages take different branches; a task
of one's own, whose layers are not known; activations in the host's memory. More stages
than repeats are refused too.
Limits: prefix and suffix are held by every stage.

Without a pipeline what `--zero` names is sharded over `fsdp`, `expert` and `context`
alike: Llama-3-8B with rows of 128k tokens, fsdp 2 x context 8 on 16 v5p, takes 20 GB a
device, where over `fsdp` alone it took 75. Microbatches are summed by
`train.accumulation`, over devices once a step too where the sum of gradients is whole
(`--parallel.reduce_once`).

**Experts.** `--mesh.expert P` gives each device E / P experts, and splits the rows of a
batch as `data` does. A token's router, always float32, runs where the token is. Without
`model.capacity_factor` no token is dropped (`dropless`): rows are grouped by expert,
exchanged by one ragged all-to-all and multiplied by a grouped matmul; the buffer that
receives them must have room for the worst case, in which all tokens go to one device.
With it an expert takes `capacity_factor` times its even share of each row, in order of
position, through buffers of fixed size and a plain all-to-all; a token that finds no
room keeps what its other experts give. `--parallel.experts dense` computes every expert
on every token instead and is the oracle of both.

**Context.** `--mesh.context P` splits rows of `train.length` tokens. Targets, positions
and segments are made of whole rows and then laid out in the order in which every device
has the same work, so no loss, dropout mask or queue of an expert changes.
`--parallel.context`:

- `ring`: keys and values go round P devices while what is here is computed; memory for
  two parts of them. Half of all scores are computed, as causality asks. Inside, splash
  on TPU (parts of a row are multiples of 256 tokens) and cuDNN on GPU (with documents
  up to 16,384 tokens), blocks of 512 queries elsewhere; of layers with a window the
  parts in sight, by splash or in blocks.
- `all_gather`: one collective, memory for the keys of whole rows; it goes with stages.
  On a TPU one call of splash then does all, with windows too, and merges nothing: for
  Llama-3-8B with rows of 128k tokens on 16 v5p a step's price, kernels apart, is 2.5 s
  where that of a ring is 3.1 (20.6 and 19.4 GB). Not in these: the kernel passes over
  the blocks that it skips, as many as it computes; in a ring there are none. Of very
  long rows (from 340,000 tokens on 2 devices) some of the queries a call. On a GPU
  cuDNN meets chunk after chunk, and blocks those that a window shows.
- `ulysses`: two exchanges; any kernel, with windows too. P must divide the key heads of
  a device, or be shared out among the queries of one.

Balance, z and capacity are defined for one row, then averaged over rows by their
numbers of targets. So `--mesh.*`, `--train.microbatches` and stages change no number.
"""
