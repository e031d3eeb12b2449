"""Parameters that a run begins with, or that are used as they are, and their model.

A source is one of

    RUN, RUN@STEP     a run folder: its newest good checkpoint, or that of a step
    HF_DIR            a published folder: config.json and safetensors
    FILE.gguf         a llama.cpp file (extra `gguf`)

`open_source` tells which it is and what model it holds, without reading an array.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxinfra
from jaxinfra import options, params, runfolder
from jaxinfra.checkpoint import restore
from jaxinfra.config import FOR_TRAINING, Config, ConfigError, DataError, ModelConfig
from jaxinfra.interop import hf, runs, same_model, tokenizers_of
from jaxinfra.models.specs import param_specs
from jaxinfra.params import Tree
from jaxinfra.quant import compression, rescaled
from jaxinfra.quant.compression import Compression
from jaxinfra.sharding import Layout


class Source(NamedTuple):
    """A model and its parameters, not read yet.

    read(model, specs, layout=, dtype=) -> parameters of `param_specs(model)`, where
    `model` is the source's or one that computes the same; some of them in few bits if
    the source is `compressed`.
    """

    where: str
    model: ModelConfig
    read: Callable[..., Tree]
    family: str = ""  # of published ones
    compressed: Compression | None = None
    router_bias: Callable[[Layout], jax.Array] | None = None

    def load(self, *, layout: Layout, dtype: Any) -> Tree:
        """The parameters of the source's own model, arrays of `dtype`, laid out as
        `layout.params` says, with `router_bias` beside them if there is one."""
        return self._plain(self.load_kept(layout=layout, dtype=dtype), dtype)

    def load_kept(self, *, layout: Layout, dtype: Any) -> Tree:
        """As `load`, but what the source keeps in few bits stays so: for what only
        runs the model."""
        specs = param_specs(self.model)
        weights = self.read(self.model, specs, layout=layout, dtype=dtype)
        if self.router_bias is None:
            return weights
        return weights | {"router_bias": self.router_bias(layout)}

    def _plain(self, weights: Tree, dtype: Any) -> Tree:
        return weights if self.compressed is None else rescaled.plain(weights, dtype)

    def adopt(self, config: Config) -> Config:
        """`config` with the source's model, but for what only training reads, and for
        a vocabulary that `config` states."""
        kept = {name: getattr(config.model, name) for name in FOR_TRAINING}
        kept["vocab_size"] = config.model.vocab_size or self.model.vocab_size
        model = dataclasses.replace(self.model, **kept)
        return dataclasses.replace(config, model=model)

    def check(self, model: ModelConfig, tokenizer: Any = None) -> None:
        """Raises ConfigError, with the keys, where `model` computes another function
        (the vocabulary may differ), or where `tokenizer`, a `Tokenizer.to_json()`, has
        other ids for the tokens of the source's own."""
        same = dataclasses.replace(model, vocab_size=self.model.vocab_size)
        if differ := same_model.differences(same, self.model):
            raise ConfigError(
                f"init.from={self.where} is another model than the config's: "
                f"{'; '.join(differ)}; set these keys to the source's, or take its "
                "model by --init.model true"
            )
        if tokenizer is not None and not tokenizers_of.has_same_ids(
            self.where, tokenizer
        ):
            raise ConfigError(
                f"init.from={self.where} has another tokenizer than the data, so its "
                "parameters mean other tokens; prepare the data by --tokenizer with "
                "that of the source, or take its tokenizer's files away to begin with "
                "its parameters all the same"
            )

    def begin(
        self, model: ModelConfig, *, layout: Layout, dtype: Any
    ) -> tuple[Tree, str]:
        """(parameters of `model` from the source, a line that says what was taken).

        Where `model` has more ids, the new ones begin at the mean of the others; where
        it has fewer, the last are cut. Raises as `check`.
        """
        self.check(model)
        theirs, ours = self.model.vocab_size, model.vocab_size
        same = dataclasses.replace(model, vocab_size=theirs)
        weights = self.read(same, param_specs(same), layout=layout, dtype=dtype)
        weights = self._plain(weights, dtype)
        specs = param_specs(model)
        told = f"parameters from {self.where}: {params.count(param_specs(same)):,}"
        if theirs == ours:
            return weights, told
        weights = _resized(weights, specs, theirs, ours, layout)
        if ours > theirs:
            what = f"{ours - theirs} new ids begin at the mean of the others"
        else:
            what = f"the last {theirs - ours} ids are cut"
        return weights, f"{told}; of the vocabulary, {what}"


def open_source(path: str) -> Source:
    """The source at `path`.

    Raises ConfigError for a path that is none, DataError for damaged files,
    CheckpointError where a run has no usable step.
    """
    place = pathlib.Path(path).expanduser()
    if place.is_file() and place.suffix == ".gguf":
        from jaxinfra.interop import gguf_file

        return _published(path, gguf_file.open_file(place))
    folder, step = runfolder.run_and_step(path)
    if folder.is_file():
        raise ConfigError(
            f"{path} is a file; name the folder that holds it, or a .gguf file"
        )
    fields = _read_json(folder / "config.json")
    if "model_type" in fields:
        if step is not None:
            raise ConfigError(
                f"{path} is a published model, which has no steps; leave out @{step}"
            )
        return _published(path, hf.open_folder(folder))
    if (folder / runfolder.CHECKPOINTS).is_dir():
        return _open_run(folder, step)
    raise ConfigError(
        f"{path} is neither a run folder (config.json and {runfolder.CHECKPOINTS}) nor "
        "a published model (config.json with model_type); name one of the two"
    )


def _published(where: str, published: hf.Published) -> Source:
    return Source(
        where,
        published.model,
        functools.partial(hf.read_params, published),
        published.family.model_type,
    )


def _open_run(run: pathlib.Path, step: int | None) -> Source:
    folder, pinned = run / runfolder.CHECKPOINTS, step
    step = restore.latest(folder) if step is None else step
    if step is None:
        raise ConfigError(f"{folder} has no checkpoint yet; train first")
    metadata = restore.restore(folder, step, {}).metadata
    config = options.from_json(metadata["config"], fill=True)
    if config.task != "text":
        raise ConfigError(f"{run} trained a task of its own and not a model of text")

    length = config.model.max_length or config.train.length
    model = dataclasses.replace(config.model, max_length=length)
    read = runs.read_whole
    if config.lora.rank or config.train.freeze:
        # By its public name, which loads the module: a plain run needs none of it.
        read = jaxinfra.read_tuned
    of_run, how = (run, pinned, config), None
    if runfolder.COMPRESSED in metadata["data"]:
        how = compression.from_json(metadata["data"][runfolder.COMPRESSED])
        read, of_run = runs.read_compressed, (*of_run, how)
    has_bias = config.model.num_experts and config.train.router_bias_rate
    return Source(
        f"{run}@{step}",
        model,
        functools.partial(read, *of_run),
        compressed=how,
        router_bias=functools.partial(runs.read_router_bias, run, pinned, config)
        if has_bias
        else None,
    )


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file.parent} has no config.json; name a run folder or a published model"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read ({error}); restore it") from error
    if not isinstance(fields, dict):
        raise DataError(f"{file} holds no JSON object; restore it")
    return fields


def _resized(weights: Tree, specs: Tree, old: int, new: int, layout: Layout) -> Tree:
    """Every array over the vocabulary with `new` ids, padded as the mesh wants it."""
    places = params.shardings(specs, layout, layout.params)

    def resize(array_VD: jax.Array, rows: int) -> jax.Array:
        known_VD = array_VD[:old].astype(jnp.float32)
        mean_1D = jnp.mean(known_VD, axis=0, keepdims=True)
        grown_VD = jnp.concatenate(
            [known_VD[:new], jnp.repeat(mean_1D, max(new - old, 0), axis=0)]
        )
        return jnp.pad(grown_VD, ((0, rows - new), (0, 0))).astype(array_VD.dtype)

    def one(array, spec, place):
        if "vocab" not in spec.axes:
            return array
        rows = params.physical_shape(spec, layout)[0]
        auto = jax.sharding.auto_axes(lambda x: resize(x, rows), out_sharding=place)
        return jax.jit(auto)(array)

    return jax.tree.map(one, weights, specs, places)
