"""From a config and a target to a plan: built, compiled, played."""

from typing import Any

import jax
import numpy as np

from jaxinfra import compiler_options, experiment, tasks
from jaxinfra.config import Config
from jaxinfra.data import packing
from jaxinfra.parallel import lowering, schedules
from jaxinfra.plan import analytic, compilers, cost, program, report
from jaxinfra.plan.compilers import Compiled
from jaxinfra.plan.targets import Target


def plan_step(
    config: Config,
    target: Target,
    get_task: Any = None,
    *,
    shares: cost.Shares | None = None,
) -> tuple[dict[str, Any], Compiled | None]:
    """The plan, and the compiled step that it is read from; of a step that the compiler
    refuses because it does not fit, what is known without a program, and None.

    `shares`: how often the branches of conditionals are taken, see `cost.play`; of a
    pipeline what its schedule says is added.
    Raises ConfigError for a mesh or a target that cannot be.
    """
    devices = compilers.devices(target)
    built = experiment.build(config, devices, get_task=get_task or tasks.text)
    with jax.set_mesh(built.layout.mesh):
        batch = experiment.abstract_batch(built, rows_of(built))
        state = built.abstract()
    chip, sizes = target.chip, dict(built.layout.mesh.shape)
    known = {
        "memory": analytic.memory(config, target.num_devices, chip.hbm_bytes),
        "model_flops": built.task.flops_per_row
        * (config.train.batch_size / target.num_devices),
        "options": compiler_options.for_device(
            devices[0].device_kind, config.runtime.compiler_options
        ),
        "versions": compilers.versions(target),
    }
    try:
        compiled = compilers.compile_step(built, state, batch)
    except compilers.DoesNotFit as error:
        return report.refused_plan(config, target, error.peak_bytes, **known), None
    clock = (
        cost.cycles_at(chip.clock_hz)
        if chip.clock_hz
        else cost.roofline(
            chip.matmul_share * chip.peak_flops,
            chip.hbm_bytes_per_sec,
            chip.matmul_share * chip.peak_8bit,
        )
    )
    played = cost.play(
        program.parse(compiled.text),
        clock=clock,
        link_bytes_per_sec=chip.link_bytes_per_sec,
        network_bytes_per_sec=chip.network_bytes_per_sec,
        host_bytes_per_sec=chip.host_bytes_per_sec,
        axes=sizes,
        node=target.node,
        shares=pipeline_shares(config) | dict(shares or {}),
    )
    found = report.plan(config, target, compiled=compiled, played=played, **known)
    return found, compiled


def pipeline_shares(config: Config) -> dict[str, tuple[float, float]]:
    """Of the executor's ticks, the part in which a pass is left out, and that in which
    some stage makes it, so that all wait: `cost.Shares` by the executor's scopes.

    Limits: where stages are uneven, layers that a chunk lacks are thinned out likewise.
    """
    if config.mesh.pipeline <= 1:
        return {}
    table = schedules.schedule_of(config, config.mesh.pipeline)
    rows = lowering.lower(table)[0]
    passes = {
        "/forward/": rows.forward_microbatch,
        "/backward/": rows.backward_microbatch,
        "/weight/": rows.weight_microbatch,
        "/enter/": rows.enter[:, None],
        "/leave/": rows.leave[:, None],
    }
    shares = {}
    for scope, microbatches in passes.items():
        made = float(np.mean(np.any(microbatches != schedules.NOTHING, axis=1)))
        shares[scope] = (1 - made, made)
    return shares


def rows_of(built: experiment.Experiment) -> Any:
    """One row of the batches of the task; of text without data, its shape."""
    if built.task.stream is not None:
        return built.task.stream.batch(0, np.arange(1))
    config = built.config
    token = np.uint16 if config.model.vocab_size <= 2**16 else np.uint32
    tokens = np.zeros((1, config.train.length + 1), token)
    return packing.Batch(tokens, tokens[:, :4].astype(np.uint16))
