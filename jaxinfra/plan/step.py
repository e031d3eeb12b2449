"""From a config and a target to a plan: built, compiled, played."""

from typing import Any

import jax
import numpy as np

from jaxinfra import compiler_options, experiment, slices, tasks
from jaxinfra.config import Config
from jaxinfra.data import packing
from jaxinfra.parallel import lowering, placement, schedules
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
        axes=in_a_slice(sizes, target.slices),
        node=target.node,
        shares=pipeline_shares(config) | dict(shares or {}),
    )
    found = report.plan(config, target, compiled=compiled, played=played, **known)
    return found, compiled


def in_a_slice(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Mesh axes within one of a TPU's slices, whose program numbers its own devices."""
    if count == 1:
        return sizes
    slow = slices.slow_axis(sizes, count)
    return sizes | {slow: sizes[slow] // count}


def pipeline_shares(config: Config) -> dict[str, cost.Share]:
    """How often the conditionals of a pipeline's executor and, where stages are uneven,
    those of the layers that a chunk may lack are taken.

    Time: a pass, of the ticks in which some stage makes it; layers, of the chunk that
    has most. Work: of the mean stage. Limits: layers are taken to be alike.
    """
    if config.mesh.pipeline <= 1:
        return {}
    schedule = schedules.schedule_of(config, config.mesh.pipeline)
    rows = lowering.lower(schedule)[0]
    passes = {
        "forward": rows.forward_microbatch,
        "backward": rows.backward_microbatch,
        "weight": rows.weight_microbatch,
        "enter": rows.enter[:, None],
        "leave": rows.leave[:, None],
    }
    shares = {}
    for name, microbatches in passes.items():
        is_made = microbatches != schedules.NOTHING
        shares[f"/{name}"] = _taken(np.mean(is_made.any(axis=1)), np.mean(is_made))
    layers, most = _layers_that_may_lack(config, schedule)
    if most:
        # Not a conditional of the layer itself, as a ring's.
        inside = r"/(forward|backward|weight)/cond/((?!attention|ffn).)*"
        shares[inside] = _taken(max(layers) / most, np.mean(layers) / most)
    return shares


def _taken(secs: Any, work: Any) -> cost.Share:
    """Of a `lax.cond`, whose branch for true is taken so often."""
    secs, work = float(secs), float(work)
    return cost.Share((1 - secs, secs), (1 - work, work))


def _layers_that_may_lack(
    config: Config, schedule: schedules.Schedule
) -> tuple[list[int], int]:
    """How many layers under a conditional each chunk has, and how many there are in the
    program of all."""
    model = config.model
    prefix, size, suffix = len(model.prefix), len(model.pattern), len(model.suffix)
    placed = placement.place(
        model.repeats,
        stages=schedule.stages,
        virtual=schedule.virtual,
        size=size,
        prefix=prefix,
        suffix=suffix,
    )
    loose = 0 if placed.is_even else size
    layers = [loose * int(count) for count in placed.count.reshape(-1)]
    layers[0] += prefix
    layers[-1] += suffix
    return layers, loose * placed.depth + prefix + suffix


def rows_of(built: experiment.Experiment) -> Any:
    """One row of the batches of the task; of text without data, its shape."""
    if built.task.stream is not None:
        return built.task.stream.batch(0, np.arange(1))
    config = built.config
    token = np.uint16 if config.model.vocab_size <= 2**16 else np.uint32
    tokens = np.zeros((1, config.train.length + 1), token)
    return packing.Batch(tokens, tokens[:, :4].astype(np.uint16))
