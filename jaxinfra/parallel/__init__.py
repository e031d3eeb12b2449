"""Work split over devices beyond what the sharding of arrays says: pipelines.

A pipeline (`pipeline`) is three things apart. `schedules`, jax-free: a schedule is a
table tick x stage, checked, drawn as text, its bubble counted; gpipe, 1f1b,
interleaved, zero_bubble, or a table of one's own. `placement`, jax-free: which repeats
of the stack each chunk of layers holds, and how they travel there from where they are
at rest. `pipeline`: one program that walks any such table; `chunks` has what a stage
does with its layers, `phases` cuts a layer's pull-back into parts, so that weight
gradients can wait. `train.pipelined` makes a `GradFn` of it.

What composes with a pipeline: data, fsdp, tensor, context and expert axes, every zero,
float32, bfloat16 and float16, dropout, documents, unequal weights, tied tables, a
prefix and a suffix, repeats that do not divide. With zero 3 the parameters of a stage
are gathered once a step and are whole meanwhile; zero is 1 unless it is set. What does
not: a task of one's own (its layers are not known), more stages than repeats.

Limits: the row of what is rematerialised is a layer; a stage's prefix and suffix are
held by every stage. Sums over microbatches are in another order than without.
"""
