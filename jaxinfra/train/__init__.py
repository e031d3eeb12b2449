"""Training: from a loss to a run.

| file | subject |
|---|---|
| `objective` | the loss contract (sum of the loss, sum of weights); next-token loss |
| `gradients` | `grad_of`, `accumulate`: wrappers that return a `GradFn` |
| `optim` | optax by name, decay and muon by kind, schedules |
| `state` | `TrainState` and where each part of it lives |
| `step` | (state, batch) -> (state, metrics): one division, one update |
| `loop` | dispatches step n before it reads n - 1; evaluation, saves, reasons to stop |
| `metrics`, `journal`, `progress` | figures on their way to disk and screen |
| `evaluate`, `flops`, `facts`, `profile`, `saving` | what their names say |

Why the loss is a sum: microbatches, devices and documents have unequal numbers of
targets. Sums add up in any order; the step divides once, by the global weight. Why the
update is told the step: the learning rate follows the run, also across updates that
were skipped.
"""
