"""Training: from a loss to a run.

| file | subject |
|---|---|
| `objective` | the contract (sums of loss and weights), next-token loss, gradients |
| `accumulation` | gradients of microbatches: summed on a device, then over devices |
| `optim` | optax by name and by kind, schedules, an average, rounding of updates |
| `state`, `saving` | `TrainState`, where each part lives, its way to checkpoints |
| `step` | (state, batch) -> (state, metrics): one division, one update |
| `loop` | dispatches step n before it reads n - 1; evaluation, saves, reasons to stop |
| `journal` | figures on their way from the device to disk and screen |
| `feeding`, `evaluate` | batches of training; the loss, and more, on held-out sets |
| `facts` | headline, bytes at rest, FLOPs and peak, profile |

Why the loss is a sum: microbatches, devices and documents have unequal numbers of
targets. Sums add up in any order; the step divides once, by the global weight. Why the
update is told the step: the learning rate follows the run, also across updates that
were skipped.
"""
