"""What is learned, and from what: the contract, and the task of text.

A `Task` is all that `experiment` knows of a model and its data. Text is the default; a
config file that defines, beside `get_config`, `get_task(config, layout, policy) ->
Task` brings its own (`configs/digits_convnet.py`), and the loop, the journal, the
checkpoints and the meshes are the same. `interop.flax_bridge` makes one of a flax
module.
"""

import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import jaxinfra
from jaxinfra import runfolder
from jaxinfra.config import Config, ConfigError
from jaxinfra.data import batches, packing, shards
from jaxinfra.generate import decode
from jaxinfra.models import transformer
from jaxinfra.ops import attention, layers, loss, seam
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Layout
from jaxinfra.train import evaluate, facts, objective
from jaxinfra.train.objective import LossFn


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
    first(key) -> (params, model_state); None: as `specs` say, and no model state.
    update_state(model_state, stats of the loss) -> the next model_state.
    on_batch(function) -> loss_fn, or a GradFn made of it, for batches of the stream;
      what it does comes before microbatches are cut: rows get their ids there.
    observe(batch) -> metrics of a batch. unit: what the loss's weights count.
    flops_per_row: forward and backward; 0: not known, and no MFU is shown.
    ending(params) -> text that a finished run ends with; None: nothing.
    notes: what --check prints under the parameters. model: for a caller's own use.
    files: name -> JSON value of files that the run folder is to hold.
    """

    specs: Tree
    loss_fn: LossFn
    stream: Stream | None = None
    eval_sets: Mapping[str, evaluate.Rows] = types.MappingProxyType({})
    first: Callable[[jax.Array], tuple[Tree, Tree]] | None = None
    update_state: Callable[[Tree, Any], Tree] = lambda model_state, stats: model_state
    on_batch: Callable[[Any], Any] = lambda function: function
    observe: Callable[[Any], dict[str, jax.Array]] = lambda batch: {}
    unit: str = "row"
    flops_per_row: float = 0.0
    ending: Callable[[Tree], str] | None = None
    notes: str = ""
    model: Any = None
    files: Mapping[str, Any] = types.MappingProxyType({})


class GetTask(Protocol):
    """What a config file may define beside `get_config`."""

    def __call__(self, config: Config, layout: Layout, policy: Policy, /) -> Task:
        """The task of `config`; raises ConfigError or DataError for what cannot be."""
        ...


def text(
    config: Config,
    layout: Layout,
    policy: Policy,
    data: shards.Dataset | None = None,
) -> Task:
    """The next token of packed text, by a transformer; `config` is resolved. Without
    `data` there is neither stream nor evaluation."""
    rules, train = layout.params, config.train
    ops = seam.Ops(
        seam.make_einsum(policy, rules),
        attention.make_attend(rules),
        layers.dense_dispatch,
    )
    model = transformer.make_model(
        config.model,
        ops=ops,
        policy=policy,
        rules=rules,
        remat=train.remat,
        unroll=train.unroll,
    )
    loss_fn = objective.next_token_loss(
        model,
        loss.LossConfig(
            vocab_size=config.model.vocab_size,
            policy=policy,
            rules=rules,
            chunk=train.loss_chunk,
            softcap=config.model.logit_softcap,
            z_loss=train.z_loss,
            label_smoothing=train.label_smoothing,
        ),
        document_mask=config.model.document_mask,
    )
    per_token = facts.train_flops_per_token(
        config.model, model.specs, length=train.length
    )
    # The key tells the loss that it is trained by: without one it does not smooth.
    is_random = config.model.dropout > 0 or train.label_smoothing > 0
    task = Task(
        specs=model.specs,
        loss_fn=loss_fn,
        on_batch=lambda function: objective.with_row_ids(
            function, rules, is_random=is_random
        ),
        observe=_padding,
        unit="token",
        flops_per_row=per_token * train.length,
        notes=attention.table(),
        model=model,
    )
    if data is None:
        return task
    prompt = config.sample.prompt
    if config.sample.tokens:
        data.tokenizer.encode(prompt)  # else the run would end in an error
    ending = lambda weights: "--- sample ---\n{}".format(
        *continued(config, layout, policy, data, weights, [prompt])
    )
    return task._replace(
        stream=batches.make_stream(
            data.split("train"),
            length=train.length,
            batch_size=train.batch_size,
            seed=config.run.seed,
            shuffle=config.data.shuffle,
        ),
        eval_sets=_eval_sets(config, data),
        ending=ending if config.sample.tokens else None,
        files={runfolder.TOKENIZER: data.tokenizer.to_json()},
    )


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
    return shards.open_dataset(folder)


def continued(
    config: Config,
    layout: Layout,
    policy: Policy,
    data: shards.Dataset,
    weights: Tree,
    prompts: list[str],
) -> list[str]:
    """Prompts with their continuations by parameters `weights`, as config.sample
    says."""
    texts = decode.continue_prompts(
        weights,
        prompts,
        data.tokenizer,
        config.sample,
        model=config.model,
        policy=policy,
        layout=layout,
        seed=config.run.seed,
    )
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def _eval_sets(config: Config, data: shards.Dataset) -> dict[str, batches.Evaluation]:
    """The data's own held-out split, if it has one, and the sets of eval.sets."""
    splits = {"held_out": data.splits.get("held_out")}
    for name, path in config.eval.sets.items():
        other = open_text(config, path)
        if other.tokenizer.digest() != data.tokenizer.digest():
            raise ConfigError(
                f"eval.sets.{name}={path} has another tokenizer than data.path="
                f"{config.data.path}; prepare both with the same one"
            )
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
    return {"padding_frac": jnp.mean((batch.segments_BT1 == 0).astype(jnp.float32))}
