"""The composition root: a `Config` and a `Task` become functions, and these a run.

`build` puts the pieces together and compiles nothing; `train` runs them on the run
folder and returns an exit code. Reading these two functions is reading the framework.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxinfra
from jaxinfra import checks, mesh, options, precision, runfolder, sharding, tasks
from jaxinfra.checkpoint import processes
from jaxinfra.config import Config, ConfigError, DataError
from jaxinfra.precision import Policy
from jaxinfra.resilience import exitcodes, preemption
from jaxinfra.sharding import Layout
from jaxinfra.tasks import GetTask, Task
from jaxinfra.train import evaluate, facts, feeding, loop, objective, optim, saving
from jaxinfra.train import state as states
from jaxinfra.train import step as steps
from jaxinfra.train.journal import Journal
from jaxinfra.train.state import Shardings, TrainState


class Experiment(NamedTuple):
    """All that a run is made of; every function is pure.

    train_step(state, batch) -> (state, metrics), jitted with its state donated.
    eval_step(params, model_state, batch) -> (loss_sum, Aux), jitted.
    init(begun=None) -> the first TrainState, sharded; abstract() -> its shapes.
    schedule(step) -> part of the peak.
    """

    config: Config
    layout: Layout
    policy: Policy
    task: Task
    shardings: Shardings
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., tuple[jax.Array, objective.Aux]]
    init: Callable[..., TrainState]
    abstract: Callable[[], TrainState]

    @property
    def model(self) -> Any:
        """The task's own: for text a `transformer.Model`."""
        return self.task.model


def resolve(config: Config, vocab_size: int) -> Config:
    """`config`, checked, with the tokenizer's vocabulary where the model states
    none."""
    checks.check(config, vocab_size=vocab_size)
    vocab_size = config.model.vocab_size or vocab_size
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return dataclasses.replace(config, model=model)


def build(
    config: Config,
    devices: list[jax.Device] | None = None,
    *,
    get_task: GetTask = tasks.text,
) -> Experiment:
    """Puts the functions of a task and its config, resolved if it is of text, together;
    nothing is compiled.

    `devices` may be those of a topology that is not here. Raises ConfigError if the
    mesh or a shape does not fit them.
    """
    layout = lay_out(config, list(jax.devices() if devices is None else devices))
    policy = precision.policy(config.precision)
    task = get_task(config, layout, policy)
    if not isinstance(task, Task):
        raise ConfigError(
            f"get_task of config {config.name!r} gives {type(task).__name__}; it must "
            "give a jaxinfra.Task"
        )
    if config.task == "own" and config.comm.gather != "compute":
        task = jaxinfra.gathered_in_few_bits(task, config.comm)
    schedule = optim.make_schedule(config.optimizer, config.train.steps)
    tx = optim.make_optimizer(
        config.optimizer, task.specs, schedule, moments=policy.optimizer_state
    )
    try:
        places = states.make_shardings(task.specs, tx, layout)
    except ValueError as error:  # a dim that does not divide: the text names the key
        raise ConfigError(str(error)) from error
    order = {}
    if config.optimizer.offload:
        places, order = jaxinfra.state_on_host(places), {"ordered": jaxinfra.in_turn}
    grad_fn = task.grad_fn or objective.grad_of(task.loss_fn)
    if config.train.microbatches == 1 or layout.mesh.shape["pipeline"] > 1:
        grad_fn = objective.placed(grad_fn, places.grads)  # stages cut the batch
    else:
        grad_fn = jaxinfra.accumulated(task, config, layout, policy, places.grads)

    def observe(batch: Any) -> dict[str, jax.Array]:
        # By its public name, which loads the module.
        more = (
            {"digest": jaxinfra.digest(batch)} if config.train.log_batch_digest else {}
        )
        return task.observe(batch) | more

    train_step = steps.make_train_step(
        task.on_batch(grad_fn),
        tx,
        shardings=places,
        apply=_apply(config, policy),
        **order,
        observe=observe,
        update_state=task.update_state,
    )
    if "offload:" in config.train.remat:
        jaxinfra.check_activations(layout.mesh)
    parts = (task.specs, tx, places, layout)
    how = {"dtype": policy.param, "first": task.first, "loss_scale": policy.loss_scale}
    how["model_state"] = task.model_state
    abstract = how | {"frozen": task.frozen}
    eval_step = evaluate.make_eval_step(task.on_batch(task.loss_fn))
    made_by = jaxinfra.accepted_options(layout.mesh, config.runtime.compiler_options)
    return Experiment(
        config=config,
        layout=layout,
        policy=policy,
        task=task,
        shardings=places,
        tx=tx,
        schedule=schedule,
        train_step=jax.jit(train_step, donate_argnums=0, compiler_options=made_by),
        eval_step=jax.jit(eval_step, compiler_options=made_by),
        init=functools.partial(states.init_state, *parts, seed=config.run.seed, **how),
        abstract=functools.partial(states.abstract_state, *parts, **abstract),
    )


def _apply(config: Config, policy: Policy) -> optim.Apply:
    """How updates enter the parameters: stochastic rounding is loaded, by its public
    name, where they are too narrow for what is added."""
    if config.train.rounding == "nearest" or policy.param == np.float32:
        return optim.apply_nearest
    return jaxinfra.apply_stochastic


def lay_out(config: Config, devices: list[jax.Device]) -> Layout:
    """The mesh of these devices that `config` asks for, and where arrays live on it."""
    sizes = checks.resolve_mesh(config, len(devices))
    try:
        grid = mesh.make_mesh(sizes, devices=devices, slices=config.mesh.slices)
    except ValueError as error:
        raise ConfigError(f"mesh.slices={config.mesh.slices}: {error}") from error
    return sharding.make_layout(grid, zero=checks.resolve_zero(config))


def train(config: Config, get_task: GetTask | None = None, source: Any = None) -> int:
    """Trains `config` in its run folder, going on from its newest checkpoint, or else
    from the parameters of `source`, an `interop.pretrained.Source`.

    `get_task` makes what is learned; default: text, as `config` says. Returns an exit
    code of `resilience.exitcodes`. Raises ConfigError or DataError for input that
    cannot work, before anything is compiled or written to the run folder.
    """
    started_secs = time.monotonic()
    if get_task is None:
        data = tasks.open_sets(config)
        config = resolve(config, next(iter(data.values())).tokenizer.vocab_size)
        get_task = functools.partial(tasks.text, data=data)
    else:
        config = dataclasses.replace(config, task="own")
    experiment = build(config, get_task=get_task)
    task, layout = experiment.task, experiment.layout
    if source is not None:
        source.check(config.model, task.files.get(runfolder.TOKENIZER))
    stream, rows = task.stream, batch_sharding(layout)
    if stream is None:
        raise ConfigError(f"the task of config {config.name!r} has no stream")
    eval_sets = {
        name: evaluate.eval_set(held_out, batches=config.eval.batches, sharding=rows)
        for name, held_out in task.eval_sets.items()
    }
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(jax.set_mesh(layout.mesh))
        if config.check:
            return jaxinfra.trace(experiment)
        run_dir, group = runfolder.folder(config), processes.this_job()
        if group.size > 1:
            experiment = jaxinfra.compiled_by_all(experiment, group.store)
        stop = enter(preemption.stop_requests())
        owner = enter(saving.owned(run_dir, group))
        journal = enter(Journal(run_dir, is_first=group.rank == 0))
        abstract = experiment.abstract()
        saver = saving.Saver(
            run_dir,
            abstract=abstract,
            logical_shapes=states.logical_shapes(abstract, task.specs, layout),
            stream=stream.identity(),
            config=options.recorded(config),
            settings=config.checkpoint,
            journal=journal,
            owner=owner,
            group=group,
        )
        begun, state = None, saver.restore(accept_changes=config.run.accept_changes)
        if source is not None and (state is None or task.frozen is not None):
            weights, told = source.begin(
                config.model, layout=layout, dtype=experiment.policy.param
            )
            journal.say(told)
            begun = task.adopt(weights)
        state = experiment.init(begun=begun) if state is None else state
        state = states.with_frozen(state, begun)
        start = int(jax.device_get(state.step))
        told = {"attempt": owner.attempt, "rejected": saver.rejected}
        told |= facts.bytes_at_rest(state, task.specs, layout, experiment.policy)
        owner.check()  # who was fenced meanwhile takes nothing back of the successor's
        journal.start(config, start=start, facts=told, unit=task.unit, files=task.files)
        if start:
            journal.event("restore", step=start)
        journal.say(
            facts.headline(config, task.specs, layout, start=start, run_dir=run_dir)
        )
        for passed_over, why in saver.rejected:
            journal.say(f"step {passed_over} is passed over: {why}")
        stop_wanted = lambda: preemption.why_stop(
            stop, since_secs=started_secs, max_secs=config.train.max_secs
        )
        failed: list[DataError] = []
        fetched = feeding.fetched(
            config,
            task,
            rows,
            start=start,
            tell_damage=journal.damage,
            gives_up=lambda: stop_wanted() is not None,
            failed=failed,
        )
        state, code = loop.run(
            experiment.train_step,
            state,
            enter(contextlib.closing(fetched)),
            start=start,
            schedule=facts.loop_schedule(config, task.flops_per_row, layout.mesh),
            hooks=loop.Hooks(
                evaluate=lambda state: evaluate.evaluate(
                    experiment.eval_step, eval_sets, *states.to_use(state)
                ),
                ballot=processes.make_ballot(layout.mesh),
                stop_wanted=stop_wanted,
                profile=enter(facts.profiler(config.profile, run_dir)),
            ),
            saver=saver,
            journal=journal,
            lr=optim.on_host(experiment.schedule, config.optimizer, config.train.steps),
        )
        if code == exitcodes.SAVE_FAILED:
            owner.check()  # a save refused because another run owns the folder: exit 16
        journal.event("end", step=int(jax.device_get(state.step)), code=code)
        if failed:
            raise failed[0]
        if code == exitcodes.DONE and task.ending:
            journal.say(task.ending(*states.to_use(state)))
        return code


def abstract_batch(experiment: Experiment, rows: Any) -> Any:
    """Shapes, dtypes and shardings of a batch of which `rows`, arrays or shapes [rows,
    ...], are some."""
    place, count = batch_sharding(experiment.layout), experiment.config.train.batch_size
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=place),
        rows,
    )


def batch_sharding(layout: Layout) -> jax.NamedSharding:
    """Of the rows of a batch; their other dims arrive whole."""
    return jax.NamedSharding(layout.mesh, sharding.spec(layout.params, "batch"))
