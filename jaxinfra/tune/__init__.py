"""Training a part of a model's parameters, or low-rank adapters beside them.

| file | subject |
|---|---|
| `roles` | which parameters are frozen, trained or adapted, by patterns |
| `lora` | a matrix and its low-rank pair as one weight: contracted, merged, by row |
| `frozen` | a task whose frozen parameters are no part of what is trained or saved |

What is trained is a smaller tree than the model's: `TrainState.params`, the optimizer's
moments and the checkpoints hold it alone, and gradients are taken by nothing else. The
frozen rest stands in the model state (`objective.Frozen`), comes from `init.from` at
every start, and is known by a digest that each checkpoint has: going on beside other
parameters is refused. A loss sees them joined; an adapted matrix is a `LowRank`, which
the seam's einsum asks how it is contracted, so no model knows of it. Its base may be
held in few bits (`lora.base`, QLoRA). The stages of a pipeline get the whole tree, and
take gradients of what is trained alone.

A run with adapters is a source like any other: `generate`, `evaluate` and `convert`
merge it. `generate --adapter RUN` keeps one base and gives each prompt its own.
"""
