"""What a run tells of itself when it starts: a headline, bytes at rest, FLOPs a
step."""

import pathlib

import jax

from jaxinfra import params, sharding
from jaxinfra.config import Config
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Layout
from jaxinfra.train import flops, loop
from jaxinfra.train.state import TrainState


def headline(
    config: Config, specs: Tree, layout: Layout, *, start: int, run_dir: pathlib.Path
) -> str:
    """One line: model, size, precision, mesh, where it starts and where it lives."""
    mesh = layout.mesh
    used = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    return (
        f"{config.name}: {params.count(specs):,} parameters, {config.precision}, "
        f"{mesh.size} x {mesh.devices.flat[0].device_kind} "
        f"({' x '.join(used) or 'one device'}); "
        f"{'goes on after' if start else 'from'} step {start} in {run_dir}"
    )


def bytes_at_rest(
    state: TrainState, specs: Tree, layout: Layout, policy: Policy
) -> dict[str, int]:
    """Bytes on one device, as metrics; gradients as they are between the backward pass
    and the update. `state` may be abstract."""
    grads = params.abstract(specs, layout, layout.grads, policy.param)
    trees = {"params": state.params, "grads": grads, "opt": state.opt_state}
    return {
        f"memory/{name}_bytes": sharding.bytes_per_device(tree)
        for name, tree in trees.items()
    }


def loop_schedule(
    config: Config, specs: Tree, mesh: jax.sharding.Mesh
) -> loop.Schedule:
    """When the loop does what, and what MFU is measured against."""
    train = config.train
    per_token = flops.train_flops_per_token(config.model, specs, length=train.length)
    peak = flops.peak_flops(mesh.devices.flat[0])
    return loop.Schedule(
        steps=train.steps,
        save_every=train.save_every,
        eval_every=config.eval.every,
        max_bad_steps=train.max_bad_steps,
        flops_per_step=per_token * train.batch_size * train.length,
        peak_flops=peak and peak * mesh.size,
    )
