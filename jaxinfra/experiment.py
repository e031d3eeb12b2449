"""The composition root: a `Config` becomes functions, and they become a run.

`build` puts the pieces together and compiles nothing; `train` runs them on the run
folder and returns an exit code. Reading these two functions is reading the framework.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxinfra import checks, mesh, options, params, precision, runfolder, sharding
from jaxinfra.checkpoint import processes
from jaxinfra.config import Config, ConfigError
from jaxinfra.data import batches, device, packing, prepare, shards
from jaxinfra.generate import decode
from jaxinfra.models import transformer
from jaxinfra.ops import attention, loss, seam
from jaxinfra.precision import Policy
from jaxinfra.resilience import exitcodes, preemption
from jaxinfra.sharding import Layout
from jaxinfra.train import evaluate, facts, loop, objective, optim
from jaxinfra.train import state as states
from jaxinfra.train import step as steps
from jaxinfra.train.journal import Journal
from jaxinfra.train.state import Shardings, TrainState


class Experiment(NamedTuple):
    """All that a run is made of; every function is pure.

    train_step(state, batch) -> (state, metrics), jitted with its state donated.
    eval_step(params, model_state, batch) -> (loss_sum, weight_sum), jitted.
    init() -> the first TrainState, sharded. schedule(step) -> fraction of the peak.
    """

    config: Config
    layout: Layout
    policy: Policy
    model: transformer.Model
    shardings: Shardings
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., tuple[jax.Array, jax.Array]]
    init: Callable[[], TrainState]


def open_data(config: Config, path: str = "") -> shards.Dataset:
    """The data set at `path` (default data.path); text is prepared into the cache."""
    folder = prepare.prepared(
        path or config.data.path,
        cache_dir=cache_dir(config) / "data",
        tokenizer=config.data.tokenizer,
        split=config.data.split,
        held_out=config.data.held_out,
        seed=config.run.seed,
    )
    return shards.open_dataset(folder)


def cache_dir(config: Config) -> pathlib.Path:
    """Where prepared text and compiled programs are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(config.data.cache_dir or pathlib.Path(home, "jaxinfra"))
    return folder.expanduser()


def resolve(config: Config, vocab_size: int) -> Config:
    """`config`, checked, with the tokenizer's vocabulary where the model states
    none."""
    checks.check(config, vocab_size=vocab_size)
    vocab_size = config.model.vocab_size or vocab_size
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return dataclasses.replace(config, model=model)


def build(config: Config, devices: list[jax.Device] | None = None) -> Experiment:
    """Puts the functions of a resolved config together; nothing is compiled.

    `devices` may be those of a topology that is not here. Raises ConfigError if the
    mesh or a shape does not fit them.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = checks.resolve_mesh(config, len(devices))
    try:
        grid = mesh.make_mesh(sizes, devices=devices, slices=config.mesh.slices)
    except ValueError as error:
        raise ConfigError(f"mesh.slices={config.mesh.slices}: {error}") from error
    layout = sharding.make_layout(grid, zero=checks.resolve_zero(config))
    rules, policy = layout.params, precision.policy(config.precision)
    ops = seam.Ops(seam.make_einsum(policy, rules), attention.make_attend(rules))
    model = transformer.make_model(
        config.model,
        ops=ops,
        policy=policy,
        rules=rules,
        remat=config.train.remat,
        unroll=config.train.unroll,
    )
    schedule = optim.make_schedule(config.optimizer, config.train.steps)
    tx = optim.make_optimizer(config.optimizer, model.specs, schedule)
    try:
        places = states.make_shardings(model.specs, tx, layout)
    except ValueError as error:  # a dim that does not divide: the text names the key
        raise ConfigError(str(error)) from error
    loss_fn = objective.next_token_loss(
        model,
        loss.LossConfig(
            vocab_size=config.model.vocab_size,
            policy=policy,
            rules=rules,
            chunk=config.train.loss_chunk,
            softcap=config.model.logit_softcap,
            z_loss=config.train.z_loss,
        ),
        document_mask=config.model.document_mask,
    )
    grad_fn = objective.accumulate(
        objective.grad_of(loss_fn), config.train.microbatches, shardings=places.grads
    )
    train_step = steps.make_train_step(
        objective.with_row_ids(grad_fn, rules, is_random=config.model.dropout > 0),
        tx,
        shardings=places,
        observe=functools.partial(_observe, has_digest=config.train.log_batch_digest),
    )
    eval_step = evaluate.make_eval_step(
        objective.with_row_ids(loss_fn, rules, is_random=False)
    )

    return Experiment(
        config=config,
        layout=layout,
        policy=policy,
        model=model,
        shardings=places,
        tx=tx,
        schedule=schedule,
        train_step=jax.jit(train_step, donate_argnums=0),
        eval_step=jax.jit(eval_step),
        init=functools.partial(
            states.init_state,
            model.specs,
            tx,
            places,
            layout,
            dtype=policy.param,
            seed=config.run.seed,
        ),
    )


def train(config: Config) -> int:
    """Trains `config` in its run folder, going on from its newest checkpoint.

    Returns an exit code of `resilience.exitcodes`. Raises ConfigError or DataError for
    input that cannot work, before anything is compiled or written to the run folder.
    """
    started_secs = time.monotonic()
    data = open_data(config)
    data.tokenizer.encode(config.sample.prompt)  # else the run would end in an error
    experiment = build(resolve(config, data.tokenizer.vocab_size))
    config, model, layout = experiment.config, experiment.model, experiment.layout
    stream = batches.make_stream(
        data.split("train"),
        length=config.train.length,
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
    )
    eval_sets = open_eval_sets(experiment, data)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(jax.set_mesh(layout.mesh))
        if config.check:
            return trace(experiment, stream)
        run_dir, group = runfolder.folder(config), processes.this_job()
        stop = enter(preemption.stop_requests())
        owner = enter(states.owned(run_dir, group))
        journal = enter(Journal(run_dir, is_first=group.rank == 0))
        abstract = abstract_state(experiment)
        saver = states.Saver(
            run_dir,
            abstract=abstract,
            logical_shapes=states.logical_shapes(abstract, model.specs, layout),
            stream=stream.identity(),
            config=options.to_json(config),
            keep=config.checkpoint.keep,
            owner=owner,
            group=group,
        )
        state = saver.restore(accept_changes=config.run.accept_changes)
        state = experiment.init() if state is None else state
        start = int(jax.device_get(state.step))
        told = {"attempt": owner.attempt, "rejected": saver.rejected}
        told |= facts.bytes_at_rest(state, model.specs, layout, experiment.policy)
        journal.start(config, start=start, facts=told)
        if start:
            journal.event("restore", step=start)
        journal.say(
            facts.headline(config, model.specs, layout, start=start, run_dir=run_dir)
        )
        for passed_over, why in saver.rejected:
            journal.say(f"step {passed_over} is passed over: {why}")
        fetched = device.prefetch(
            functools.partial(
                device.to_device,
                stream.batch,
                batch_size=config.train.batch_size,
                length=config.train.length,
                sharding=batch_sharding(layout),
            ),
            start,
            config.train.steps,
            depth=config.data.prefetch,
        )
        state, code = loop.run(
            experiment.train_step,
            state,
            enter(contextlib.closing(fetched)),
            start=start,
            schedule=facts.loop_schedule(config, model.specs, layout.mesh),
            hooks=loop.Hooks(
                evaluate=lambda state: evaluate.evaluate(
                    experiment.eval_step, eval_sets, state.params, state.model_state
                ),
                ballot=processes.make_ballot(layout.mesh),
                stop_wanted=lambda: preemption.why_stop(
                    stop, since_secs=started_secs, max_secs=config.train.max_secs
                ),
                profile=enter(
                    facts.tracing(
                        run_dir, start=config.profile.start, steps=config.profile.steps
                    )
                ),
            ),
            saver=saver,
            journal=journal,
            lr=optim.on_host(experiment.schedule, config.optimizer, config.train.steps),
        )
        if code == exitcodes.SAVE_FAILED:
            owner.check()  # a save refused because another run owns the folder: exit 16
        journal.event("end", step=int(jax.device_get(state.step)), code=code)
        if code == exitcodes.DONE and config.sample.tokens:
            [made] = continued(experiment, state.params, data, [config.sample.prompt])
            journal.say(f"--- sample ---\n{made}")
        return code


def continued(
    experiment: Experiment, weights: Any, data: shards.Dataset, prompts: list[str]
) -> list[str]:
    """Prompts with their continuations by parameters `weights`, as config.sample
    says."""
    return decode.continue_prompts(
        weights,
        prompts,
        data.tokenizer,
        experiment.config.sample,
        model=experiment.config.model,
        policy=experiment.policy,
        layout=experiment.layout,
        seed=experiment.config.run.seed,
    )


def generate(config: Config, prompts: list[str]) -> list[str]:
    """Prompts with their continuations, by the newest checkpoint of the run folder.

    Reads the parameters alone. Raises CheckpointError if there is no usable one.
    """
    data = open_data(config)
    experiment = build(resolve(config, data.tokenizer.vocab_size))
    with jax.set_mesh(experiment.layout.mesh):
        weights = states.restore_params(
            runfolder.folder(config), abstract_state(experiment), experiment.model.specs
        )
        return continued(experiment, weights, data, prompts)


def trace(experiment: Experiment, stream: batches.Stream) -> int:
    """Traces the whole step, compiling nothing, and prints the parameter table."""
    batch = abstract_batch(experiment, stream.packing.split.dtype)
    experiment.train_step.lower(abstract_state(experiment), batch)
    print(params.table(experiment.model.specs))
    print(attention.table())
    return exitcodes.DONE


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of the state: what to lower with or restore into."""
    return states.abstract_state(
        experiment.model.specs,
        experiment.tx,
        experiment.shardings,
        experiment.layout,
        dtype=experiment.policy.param,
    )


def abstract_batch(experiment: Experiment, token_dtype: Any) -> device.Batch:
    """Shapes, dtypes and shardings of a batch of the training stream."""
    train, place = experiment.config.train, batch_sharding(experiment.layout)
    shape = (train.batch_size, train.length + 1)
    tokens = jax.ShapeDtypeStruct(shape, token_dtype, sharding=place)
    return device.Batch(tokens, tokens.update(dtype=packing.segment_dtype(shape[1])))


def batch_sharding(layout: Layout) -> jax.NamedSharding:
    """Of the rows of a batch, which arrive whole in length."""
    rows = sharding.spec(layout.params, "batch", None)
    return jax.NamedSharding(layout.mesh, rows)


def open_eval_sets(
    experiment: Experiment, data: shards.Dataset
) -> dict[str, evaluate.EvalSet]:
    """The data's own held-out split, if it has one, and the sets of eval.sets."""
    config = experiment.config
    splits = {"held_out": data.splits.get("held_out")}
    for name, path in config.eval.sets.items():
        other = open_data(config, path)
        if other.tokenizer.digest() != data.tokenizer.digest():
            raise ConfigError(
                f"eval.sets.{name}={path} has another tokenizer than data.path="
                f"{config.data.path}; prepare both with the same one"
            )
        splits[name] = other.splits.get("held_out") or other.split("train")
    return {
        name: evaluate.eval_set(
            split,
            length=config.train.length,
            batch_size=config.eval.batch_size or config.train.batch_size,
            batches=config.eval.batches,
            sharding=batch_sharding(experiment.layout),
        )
        for name, split in splits.items()
        if split is not None
    }


def _observe(batch: device.Batch, *, has_digest: bool) -> dict[str, jax.Array]:
    """What the metrics tell of a batch."""
    observed = {"padding_frac": jnp.mean((batch.segments_BT1 == 0).astype(jnp.float32))}
    return observed | ({"digest": device.digest(batch)} if has_digest else {})
