"""What --check does: the whole step is traced, and the parameters are listed."""

import math

import numpy as np

from jaxinfra import experiment as experiments
from jaxinfra import params
from jaxinfra.experiment import Experiment
from jaxinfra.params import Tree
from jaxinfra.resilience import exitcodes


def trace(experiment: Experiment) -> int:
    """Traces the whole step, compiling nothing, and prints the parameter table."""
    assert experiment.task.stream is not None
    batch = experiments.abstract_batch(
        experiment, experiment.task.stream.batch(0, np.arange(1))
    )
    experiment.train_step.lower(experiment.abstract(), batch)
    shown = table(experiment.task.specs)
    print(*filter(None, (shown, experiment.task.notes)), sep="\n")
    return exitcodes.DONE


def table(specs: Tree) -> str:
    """One line a parameter: path, shape, axes, kind, size."""
    rows = [("parameter", "shape", "axes", "kind", "size")]
    for path, spec in params.named(specs):
        shape = " x ".join(map(str, spec.shape))
        axes = ", ".join(name or "-" for name in spec.axes)
        rows.append((path, shape, axes, spec.kind, f"{math.prod(spec.shape):,}"))
    rows.append(("total", "", "", "", f"{params.count(specs):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
