"""What is learned, and from what: the contract, and the task of text.

A `Task` is all that `experiment` knows of a model and its data. Text is the default; a
config file that defines, beside `get_config`, `get_task(config, layout, policy) ->
Task` brings its own (`configs/digits_convnet.py`), and the loop, the journal, the
checkpoints and the meshes are the same. `interop.flax_bridge` makes one of a flax
module.
"""

import dataclasses
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import jaxinfra
from jaxinfra import runfolder, sharding, stages
from jaxinfra.config import LOW_PRECISION, Config, ConfigError
from jaxinfra.data import batches, packing, shards
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.models import transformer
from jaxinfra.ops import attention, loss, seam
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Layout, Rules
from jaxinfra.train import evaluate, facts, objective
from jaxinfra.train.objective import GradFn, LossFn


class Stream(Protocol):
    """Batches for training, one for every step from 0; `data.batches` has text's."""

    def batch(self, step: int, positions: np.ndarray) -> tuple:
        """A NamedTuple of arrays [rows, ...]: those at sorted `positions` of the global
        batch of `step`, the same on every host and after every restart."""
        ...

    def identity(self) -> dict[str, Any]:
        """What must not change for step k to stay the same batch, as JSON."""
        ...


class Task(NamedTuple):
    """What is learned, and from what.

    specs: tree of ParamSpec; whence shardings, decay masks, counts.
    loss_fn: what is minimised, and in evaluation, where its key is None, reported.
    stream, eval_sets: None, and empty, to build a step without data.
    is_by_row: devices may run loss_fn on their rows alone; it goes by `sharding.spec`.
    grad_fn: of loss_fn, for training, of a whole step's batch where there is a
      pipeline; None: `objective.grad_of(loss_fn)`.
    first(key) -> (params, model_state); None: as `specs` say, and `model_state()`.
    update_state(model_state, stats of the loss) -> the next model_state.
    on_batch(function) -> loss_fn, or a GradFn made of it, for batches of the stream;
      what it does comes before microbatches are cut: rows get their ids there.
    observe(batch) -> metrics of a batch. unit: what the loss's weights count.
    flops_per_row: forward and backward; 0: not known, and no MFU is shown.
    ending(params, model_state) -> text that a finished run ends with; None: nothing.
    notes: what --check prints under the parameters. model: for a caller's own use.
    files: name -> JSON value of files that the run folder is to hold. damage() ->
      lines on data that was found damaged since the last call.
    adopt(weights) -> (params, model_state) that begin from the weights of a source.
    frozen: shapes of those that are not trained (`tune`); None: all are. whole(params,
      model_state) -> the parameters with those.
    """

    specs: Tree
    loss_fn: LossFn
    is_by_row: bool = False
    grad_fn: GradFn | None = None
    stream: Stream | None = None
    eval_sets: Mapping[str, evaluate.Rows] = types.MappingProxyType({})
    first: Callable[[jax.Array], tuple[Tree, Tree]] | None = None
    model_state: Callable[[], Tree] = tuple
    update_state: Callable[[Tree, Any], Tree] = lambda model_state, stats: model_state
    on_batch: Callable[[Any], Any] = lambda function: function
    observe: Callable[[Any], dict[str, jax.Array]] = lambda batch: {}
    unit: str = "row"
    flops_per_row: float = 0.0
    ending: Callable[[Tree, Tree], str] | None = None
    notes: str = ""
    model: Any = None
    files: Mapping[str, Any] = types.MappingProxyType({})
    damage: Callable[[], list[str]] = list
    adopt: Callable[[Tree], tuple[Tree, Tree]] = lambda weights: (weights, None)
    frozen: Tree = None
    whole: Callable[[Tree, Tree], Tree] = lambda params, state: params


class GetTask(Protocol):
    """What a config file may define beside `get_config`."""

    def __call__(self, config: Config, layout: Layout, policy: Policy, /) -> Task:
        """The task of `config`; raises ConfigError or DataError for what cannot be."""
        ...


def text(
    config: Config,
    layout: Layout,
    policy: Policy,
    data: Mapping[str, shards.Dataset] | None = None,
) -> Task:
    """The next token of packed text, by a transformer; `config` is resolved. Without
    `data`, as of `open_sets`, there is neither stream nor evaluation."""
    rules, train = activation_rules(config, layout), config.train
    einsum_of, low = _in_precision(config, layout, policy)
    has_experts = config.model.has_experts
    # By their public names, which load them: most models need none of these.
    routers = jaxinfra.Routers(config) if has_experts else None
    way, order_T = config.parallel.context, None
    if (parts := layout.mesh.shape["context"]) > 1:
        order_T = jaxinfra.row_order(train.length, parts=parts, way=way)

    def model_of(rules: Rules) -> transformer.Model:
        attend, dispatch = attention.make_attend(rules), None
        if has_experts:
            how = {"rules": rules, "way": config.parallel.experts, "comm": config.comm}
            dispatch = jaxinfra.make_dispatch(config.model, policy=policy, **how)
        if parts > 1:
            attend = jaxinfra.make_split_attend(rules, way=way)
        return transformer.make_model(
            config.model,
            ops=seam.Ops(einsum_of(rules), attend, dispatch),
            policy=policy,
            rules=rules,
            remat=train.remat,
            unroll=train.unroll,
        )

    model, grad_fn, notes = model_of(rules), None, attention.table()
    loss_config = loss.LossConfig(
        vocab_size=config.model.vocab_size,
        policy=policy,
        rules=rules,
        chunk=train.loss_chunk,
        softcap=config.model.logit_softcap,
        z_loss=train.z_loss,
        label_smoothing=train.label_smoothing,
    )
    if layout.mesh.shape["pipeline"] > 1:
        piped = jaxinfra.make_pipelined(
            model_of,
            config.model,
            loss_config,
            layout=layout,
            schedule=jaxinfra.schedule_of(config, layout.mesh.shape["pipeline"]),
            recompute=config.parallel.recompute,
            document_mask=config.model.document_mask,
            remat=train.remat,
            unroll=train.unroll,
            order_T=order_T,
            routers=routers,
            staged=low and low.staged,
            comm=config.comm,
            tuned=jaxinfra.tuned_specs(model.specs, config, layout, policy),
        )
        grad_fn, loss_fn = piped.grad_fn, piped.loss_fn
        notes += f"\n{piped.drawing}"
    else:
        loss_fn = objective.next_token_loss(
            model,
            loss_config,
            document_mask=config.model.document_mask,
            routers=routers,
            order_T=order_T,
        )
    if train.quantize_aware != "none":
        # By its public name, which loads the module: a plain run needs none of it.
        loss_fn = jaxinfra.quantize_aware(loss_fn, model.specs, config)
        grad_fn = grad_fn and jaxinfra.quantize_aware(grad_fn, model.specs, config)
    per_token = facts.train_flops_per_token(
        config.model, model.specs, length=train.length
    )
    # The key tells the loss that it is trained by: without one it does not smooth.
    only_in_training = (train.label_smoothing, train.balance_loss, train.router_z_loss)
    is_random = config.model.dropout > 0 or any(only_in_training)
    is_random |= config.precision == "int8"  # gradients are rounded by chance
    task = Task(
        specs=model.specs,
        loss_fn=loss_fn,
        is_by_row=True,
        grad_fn=grad_fn,
        on_batch=lambda function: objective.with_row_ids(
            function, rules, is_random=is_random
        ),
        observe=_padding,
        unit="token",
        flops_per_row=per_token * train.length,
        notes=notes,
        model=model,
    )
    if routers is not None:
        task = task._replace(
            model_state=routers.first_state,
            update_state=routers.update_state,
            whole=lambda params, state: params | routers.biases(state),
        )
    task = low.trained(task, per_token) if low else task
    if config.lora.rank or config.train.freeze:
        # Likewise.
        task = jaxinfra.partly_frozen(task, config, layout, policy)
    if data is None:
        return task
    prompt, tokenizer = config.sample.prompt, next(iter(data.values())).tokenizer
    if config.sample.tokens:
        tokenizer.encode(prompt)  # else the run would end in an error
    ending = lambda *trained: "--- sample ---\n{}".format(
        *continued(config, layout, policy, tokenizer, task.whole(*trained), [prompt])
    )
    return task._replace(
        stream=batches.make_stream(
            {name: opened.split("train") for name, opened in data.items()},
            length=train.length,
            batch_size=train.batch_size,
            seed=config.run.seed,
            shuffle=config.data.shuffle,
            block=config.data.shuffle_block,
            ramp=train.batch_ramp,
            weights=_weights(config) or None,
        ),
        eval_sets=_eval_sets(config, data),
        ending=ending if config.sample.tokens else None,
        files={runfolder.TOKENIZER: tokenizer.to_json()},
        damage=lambda: [line for opened in data.values() for line in _taken(opened)],
    )


def _in_precision(config: Config, layout: Layout, policy: Policy):
    """(rules -> the einsum of config.precision, its `LowPrecision` or None). What is
    for low precision is loaded, by its public name, where that is asked."""
    how = {"gather": config.comm.gather, "reduce": config.comm.reduce}
    plain_of = lambda rules: seam.make_einsum(policy, rules)
    if set(how.values()) != {"compute"}:
        plain_of = lambda rules: jaxinfra.low_bit_traffic(policy, rules, **how)
    if config.precision not in LOW_PRECISION:
        return plain_of, None
    low = jaxinfra.low_precision_training(config, layout, policy, plain_of)
    return low.einsum_of, low


def activation_rules(config: Config, layout: Layout) -> sharding.Rules:
    """Where activations are in training: as `layout.params` says, but that each device
    of the tensor axis keeps a part of the length between blocks (parallel.sequence).

    Not where these parts do not divide the length. Source: arXiv:2205.05198, 4.2.2.
    """
    sizes, rules = layout.mesh.shape, layout.params
    parts = sizes["context"] * sizes["tensor"]
    if not config.parallel.sequence or config.train.length % parts:
        return rules
    return dataclasses.replace(rules, residual=(*rules.residual, "tensor"))


def open_sets(config: Config) -> dict[str, shards.Dataset]:
    """The data sets of data.sets, or that of data.path with an empty name.

    Raises ConfigError if their tokenizers differ.
    """
    named = config.data.sets or {"": config.data.path}
    data = {name: open_text(config, path) for name, path in named.items()}
    (first, opened), *others = data.items()
    for name, other in others:
        _check_tokenizer(f"data.sets.{name}", other, f"data.sets.{first}", opened)
    return data


def open_text(config: Config, path: str = "") -> shards.Dataset:
    """The data set at `path` (default data.path); text is prepared into the cache.

    Raises ConfigError if `config` is of a task that is not text's.
    """
    if config.task != "text":
        raise ConfigError(
            f"config {config.name!r} has a task of its own, and this is for text; what "
            "it learns is in the file that scripts/train.py --config FILE was given"
        )
    path = path or config.data.path
    if "://" in path:
        remote = jaxinfra.RemoteFolder(
            path,
            cache_dir=runfolder.cache_dir(config),
            cache_bytes=int(config.data.cache_gib * 2**30),
        )
        return shards.open_dataset(remote, damaged=config.data.damaged)
    folder = pathlib.Path(path).expanduser()
    if not (folder / shards.MANIFEST).is_file():
        # By its public name, which loads the module: prepared data need none of it.
        folder = jaxinfra.prepared(
            path,
            cache_dir=runfolder.cache_dir(config) / "data",
            tokenizer=config.data.tokenizer,
            eod=config.data.eod,
            bos=config.data.bos,
            split=config.data.split,
            held_out=config.data.held_out,
            seed=config.run.seed,
        )
    return shards.open_dataset(folder, damaged=config.data.damaged)


def continued(
    config: Config,
    layout: Layout,
    policy: Policy,
    tokenizer: Tokenizer,
    weights: Tree,
    prompts: list[str],
) -> list[str]:
    """Prompts with their continuations by parameters `weights`, as config.sample
    says."""
    # By its public name, which loads the module: training needs none of it.
    texts = jaxinfra.continue_prompts(
        weights,
        prompts,
        tokenizer,
        config.sample,
        model=config.model,
        policy=policy,
        layout=layout,
        seed=config.run.seed,
    )
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def _weights(config: Config) -> dict[str, tuple[stages.Stage, ...]]:
    """Stages of the weight of each set."""
    return {
        name: stages.parse(text, key=f"data.weights.{name}")
        for name, text in config.data.weights.items()
    }


def _taken(data: shards.Dataset) -> list[str]:
    return [data.damage.pop(0) for _ in range(len(data.damage))]


def _check_tokenizer(
    key: str, other: shards.Dataset, first_key: str, first: shards.Dataset
) -> None:
    if other.tokenizer.digest() != first.tokenizer.digest():
        raise ConfigError(
            f"{key}={other.folder} has another tokenizer than {first_key}="
            f"{first.folder}; prepare both with the same one"
        )


def _eval_sets(
    config: Config, data: Mapping[str, shards.Dataset]
) -> dict[str, batches.Evaluation]:
    """The held-out splits of the data, where there are any, and the sets of
    eval.sets."""
    splits = {
        f"held_out_{name}".rstrip("_"): opened.splits.get("held_out")
        for name, opened in data.items()
    }
    first = next(iter(data.values()))
    for name, path in config.eval.sets.items():
        other = open_text(config, path)
        _check_tokenizer(f"eval.sets.{name}", other, "the data", first)
        splits[name] = other.splits.get("held_out") or other.split("train")
    return {
        name: batches.make_evaluation(
            split,
            length=config.train.length,
            batch_size=config.eval.batch_size or config.train.batch_size,
        )
        for name, split in splits.items()
        if split is not None
    }


def _padding(batch: packing.Batch) -> dict[str, jax.Array]:
    width = batch.tokens_BT1.shape[1]
    empty_B = width - batch.cuts_BC[:, 0].astype(jnp.int32)
    return {"padding_frac": jnp.mean(empty_B.astype(jnp.float32)) / width}
