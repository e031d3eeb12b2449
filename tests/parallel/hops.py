"""A state's way through a checkpoint from one mesh to another."""

import pathlib

import jax
import numpy as np

from jaxinfra import experiment, params
from jaxinfra.checkpoint import lifecycle, restore
from jaxinfra.train import state as states


def on_host(built: experiment.Experiment, state: states.TrainState) -> dict:
    """Path -> every array of the state, without padding: the same on every mesh."""
    shapes = states.logical_shapes(state, built.task.specs, built.layout)
    return {
        path: np.asarray(x)[tuple(map(slice, shapes[path]))]
        for path, x in params.named(jax.device_get(state))
    }


def save(
    folder: pathlib.Path, built: experiment.Experiment, state: states.TrainState
) -> None:
    saver = lifecycle.Checkpointer(folder, keep=1, run_id="x", attempt=1)
    saver.save(
        int(state.step),
        dict(params.named(state)),
        metadata={"config": {}, "data": {}},
        logical_shapes=states.logical_shapes(state, built.task.specs, built.layout),
    )
    saver.close()


def restored(folder: pathlib.Path, built: experiment.Experiment) -> states.TrainState:
    """The state in `folder`, on the mesh of `built`."""
    abstract = built.abstract()
    found = restore.restore_latest(
        folder,
        dict(params.named(abstract)),
        logical_shapes=states.logical_shapes(abstract, built.task.specs, built.layout),
    )
    leaves = [found.arrays[name] for name, _ in params.named(abstract)]
    return params.unflatten(abstract, leaves)
