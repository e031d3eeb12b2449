"""Fewer bits: arrays, training, optimizer state and traffic in low precision.

`arrays` is what is stored: a `QuantizedArray` is a pytree of low-bit codes and the
scales of the groups that share one, in a format of `formats` (int8, int4, fp8, mxfp8,
nf4). It goes through jit, scan, shardings and checkpoints as any other array.

Training in low precision (`--precision fp8|int8|mxfp8`) enters at the seam alone:

    recipe     which parameters, by kind and name, in which formats: data, not code
    matmul     an Einsum for weights that come wrapped: codes times codes, forward and
               in both backward matmuls; figures of each operand on the way
    train.low_precision   wraps the parameters before the loss, takes gradients and
               figures apart after it, and keeps the history of delayed scales

The rest of the policy is bfloat16's: float32 masters, head, embedding, norms and
routers in the compute dtype. Gradients in int8 are rounded by chance, keyed by step,
layer, parameter and global row, so no mesh changes a result but for the order of sums;
scales are of whole tensors or channels across all devices. Current scales are those of
a microbatch; delayed ones (`--quant.scaling delayed`) are the same for any number. In
a pipeline weights come to the stages wrapped, and their rows by turns; figures are
means over microbatches, and for delayed scales each microbatch tells its own.

When a run in low precision fails, its metrics say why: `quant/<operand>_underflow`
(what became zero), `_saturation` (what was beyond the scale, and clipped), each with
its `_worst` matmul and the worst layer of each kind, and `_scale`, for operands input,
weight and grad: `quant/grad_underflow_worst/ffn/up`. Saturation can be above zero with
delayed scales alone: current ones are those of the largest value at hand.

`communication` puts FSDP's gathers and reductions into 8 bits for any precision of 16
or 32 (`--comm.gather`, `--comm.reduce`), which pays on a slow network alone: it says
when. `train.adam8` keeps both moments of adamw in 8 bits (`--optimizer.moments 8bit`).
`random_bits` are all the chances.
"""
