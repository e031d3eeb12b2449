"""Rules of what most runs do not ask for: several processes, named activations, low
precision, adapters, meshes, stages, split rows, the best step.

Loaded by `checks` where a config asks for one of them; what two of them cannot do
together is in `compositions`. Imports no jax.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxinfra import stages
from jaxinfra.config import (
    BATCH_AXES,
    LOW_PRECISION,
    REMAT_NAMES,
    ZERO_AXES,
    CommConfig,
    Config,
    ConfigError,
    LoraConfig,
    QuantConfig,
    RuntimeConfig,
    TrainConfig,
    did_you_mean,
)

Sizes = Mapping[str, int]  # of mesh axes; the one that takes the rest may be missing


def check_features(config: Config, sizes: Sizes, zero: int) -> None:
    """Raises ConfigError at the first broken rule."""
    _check_processes(config.runtime)
    _check_best(config)
    if config.task == "text":
        _check_tuning(config)
    _check_quant(config)
    _check_low_bit_state(config, sizes, zero)
    _check_pipeline(config, sizes)
    _check_accumulation(config, sizes, zero)
    if config.task == "text" and sizes.get("context", 1) > 1:
        _check_split_length(config, sizes)


def check_divisible(config: Config, sizes: Sizes, zero: int) -> None:
    """Raises ConfigError if what the axes split does not divide over them."""
    model = config.model
    dims: list[tuple[tuple[str, ...], str]] = [
        (("tensor",), "num_heads"),
        (("tensor",), "num_kv_heads"),
        (("tensor",), "ffn_width"),
    ]
    if model.expert_ffn_width:
        dims.append((("tensor",), "expert_ffn_width"))
    if model.has_experts:
        dims.append((("expert",), "num_experts"))
    if zero >= 1:
        dims.append((ZERO_AXES, "width"))
    for axes, name in dims if config.task == "text" else ():
        used = {axis: sizes[axis] for axis in axes if sizes.get(axis, 1) > 1}
        dim, size = getattr(model, name), math.prod(used.values())
        if dim % size:
            keys = " x ".join(f"mesh.{axis}" for axis in used)
            axes = "axis" if len(used) == 1 else "axes"
            raise ConfigError(
                f"model.{name}={dim} does not divide over mesh {axes}"
                f" {' x '.join(map(repr, used))} of size {size}; set {keys} to a"
                f" divisor of {dim}"
            )
    train, slices = config.train, config.mesh.slices
    split = {axis: sizes[axis] for axis in BATCH_AXES if sizes.get(axis, 1) > 1}
    parts = math.prod(split.values())
    axes = " x ".join(f"{axis}={size}" for axis, size in split.items())
    if config.eval.batch_size % parts:
        raise ConfigError(
            f"eval.batch_size={config.eval.batch_size} rows do not divide over the"
            f" {parts} parts of mesh axes {axes}; set eval.batch_size to a multiple of"
            f" {parts}, or to 0 for train.batch_size"
        )
    for size in stages.BatchSizes(train.batch_size, train.batch_ramp).sizes[::-1]:
        if (rows := size // train.microbatches) % parts:
            key = "batch_size" if size == train.batch_size else "batch_ramp"
            raise ConfigError(
                f"train.{key}={size} in train.microbatches={train.microbatches} gives"
                f" {rows} rows, which do not divide over the {parts} parts of mesh axes"
                f" {axes}; set train.{key} to a multiple of"
                f" {parts * train.microbatches}, or a smaller mesh"
            )
    across = [axis for axis in ("data", "pipeline") if axis in sizes]
    if len(across) == 2 and all(sizes[axis] % slices for axis in across):
        raise ConfigError(
            f"mesh.slices={slices} divides neither mesh axis 'data' of size"
            f" {sizes['data']} nor 'pipeline' of size {sizes['pipeline']}; set"
            f" mesh.data to a multiple of {slices}"
        )


def remat_names(remat: str) -> dict[str, list[str]]:
    """The activations of save:NAME+NAME and of offload:NAME+NAME, either or both with a
    comma between. Raises ConfigError for another form (none, full and dots have no
    names), a name that is unknown or given twice."""
    found: dict[str, list[str]] = {}
    for part in remat.split(","):
        word, _, given = part.partition(":")
        if word not in ("save", "offload") or word in found:
            forms = ("none", "full", "dots", "save:NAME+NAME", "offload:NAME+NAME")
            raise ConfigError(
                f"train.remat={remat!r} must be {', '.join(forms)}, or the last two"
                f" with a comma between{did_you_mean(remat, forms)}"
            )
        found[word] = given.split("+")
    names = [name for part in found.values() for name in part]
    for name in names:
        if name not in REMAT_NAMES:
            raise ConfigError(
                f"train.remat={remat!r}: there is no activation {name!r}; the names"
                f" are {', '.join(REMAT_NAMES)}{did_you_mean(name, REMAT_NAMES)}"
            )
        if names.count(name) > 1:
            raise ConfigError(f"train.remat={remat!r}: {name!r} is there twice")
    return {"save": [], "offload": []} | found


def _changed(section: Any, default: Any) -> dict[str, Any]:
    """The settings of a section that are not as they are by default."""
    given = dataclasses.asdict(section)
    return {key: x for key, x in given.items() if x != getattr(default, key)}


def _check_processes(runtime: RuntimeConfig) -> None:
    if runtime.process_id >= runtime.num_processes:
        raise ConfigError(
            f"runtime.process_id={runtime.process_id} must be below"
            f" runtime.num_processes={runtime.num_processes}; processes count from 0"
        )
    if runtime.num_processes > 1 and not runtime.coordinator:
        raise ConfigError(
            f"runtime.num_processes={runtime.num_processes} must find each other;"
            " set runtime.coordinator to host:port of process 0"
        )
    if runtime.num_processes == 1 and runtime.coordinator:
        raise ConfigError(
            f"runtime.coordinator={runtime.coordinator!r} is for several processes;"
            " set runtime.num_processes too, or leave it out"
        )
    form = re.fullmatch(
        r"(?:\[[\da-fA-F:.]+\]|[^\s:/]+):(\d{1,5})", runtime.coordinator
    )
    if runtime.coordinator and not (form and 0 < int(form[1]) < 65536):
        raise ConfigError(
            f"runtime.coordinator={runtime.coordinator!r} must be host:port, such as"
            " 10.0.0.1:1234"
        )


def _check_best(config: Config) -> None:
    checkpoint = config.checkpoint
    if checkpoint.keep_best and not checkpoint.best_metric.startswith("eval/"):
        raise ConfigError(
            f"checkpoint.best_metric={checkpoint.best_metric!r} must be a figure of an"
            " evaluation, such as eval/loss or eval/held_out/loss"
        )
    if checkpoint.keep_best and not config.eval.every:
        raise ConfigError(
            f"checkpoint.keep_best={checkpoint.keep_best} keeps steps that were"
            " evaluated when they were saved, and eval.every=0 evaluates none; set"
            f" eval.every to train.save_every={config.train.save_every}"
        )


def _check_quant(config: Config) -> None:
    precision, quant = config.precision, config.quant
    for key, value in _changed(quant, QuantConfig()).items():
        if key != "scaling" and precision not in LOW_PRECISION:
            raise ConfigError(
                f"quant.{key}={value!r} is for precisions {', '.join(LOW_PRECISION)},"
                f" and precision={precision}; set one of them, or leave it out"
            )
    if quant.scaling == "delayed" and precision != "fp8":
        raise ConfigError(
            f"quant.scaling='delayed' is for precision fp8, and precision={precision};"
            " set quant.scaling to current, or precision to fp8"
        )
    if quant.history != QuantConfig().history and quant.scaling != "delayed":
        raise ConfigError(
            f"quant.history={quant.history} is of quant.scaling='delayed', and it is"
            f" {quant.scaling!r}; set it, or leave quant.history out"
        )
    if quant.scaling == "delayed" and quant.backward == "compute":
        raise ConfigError(
            "quant.scaling='delayed' keeps scales of gradients too; set quant.backward"
            " to low, or quant.scaling to current"
        )


def _check_low_bit_state(config: Config, sizes: Sizes, zero: int) -> None:
    optimizer = config.optimizer
    if optimizer.moments == "8bit" and optimizer.name != "adamw":
        raise ConfigError(
            f"optimizer.moments='8bit' is for adamw, and optimizer.name="
            f"{optimizer.name!r}; set optimizer.moments to float32"
        )
    for key, kind in _changed(config.comm, CommConfig()).items():
        if sizes.get("fsdp") == 1:
            raise ConfigError(
                f"comm.{key}={kind!r} is of what crosses the fsdp axis, and"
                f" mesh.fsdp=1; set mesh.fsdp to 2 or more, or comm.{key} to compute"
            )
        has_stages = sizes.get("pipeline", 1) > 1
        # Stages sum gradients once a step, into the shards that zero 2 makes already.
        least = 2 if key == "reduce" and has_stages else 3
        if zero < least:
            raise ConfigError(
                f"comm.{key}={kind!r} is of what fsdp splits, and with zero={zero}"
                f" these are not; set zero to {least}, or comm.{key} to compute"
            )


def _check_tuning(config: Config) -> None:
    lora, freeze = config.lora, config.train.freeze
    given = f"lora.rank={lora.rank}" if lora.rank else f"train.freeze={freeze!r}"
    if (lora.rank or freeze) and not config.init.from_:
        raise ConfigError(
            f"{given} trains beside parameters that are there already; set init.from to"
            " a run, a published folder or a .gguf file"
        )
    for name, value in _changed(lora, LoraConfig()).items():
        if not lora.rank:
            raise ConfigError(
                f"lora.{name}={value!r} is of adapted matrices, and lora.rank=0 adapts"
                f" none; set lora.rank, or leave lora.{name} out"
            )
    aware, blocks = config.train.quantize_aware, config.train.quantize_group
    usual = TrainConfig().quantize_group
    for key, form, name, group, default in (
        ("lora.base", lora.base, "lora.group", lora.group, LoraConfig().group),
        ("train.quantize_aware", aware, "train.quantize_group", blocks, usual),
    ):
        if form == "nf4" and not group:
            raise ConfigError(f"{name}=0: nf4 has groups by definition; set it to 64")
        if form in ("plain", "none") and group != default:
            raise ConfigError(
                f"{name}={group} is of matrices in few bits, and {key}={form!r} makes"
                f" none; set {key}, or leave {name} out"
            )
    if lora.rank and not lora.targets.split():
        raise ConfigError("lora.targets is empty; name matrices, or set lora.rank to 0")


def _check_pipeline(config: Config, sizes: Sizes) -> None:
    """What stages ask for, and what a schedule asks for."""
    parallel, model, stages = config.parallel, config.model, sizes.get("pipeline", 1)
    virtual = parallel.virtual_stages
    if virtual > 1 and parallel.schedule != "interleaved":
        raise ConfigError(
            f"parallel.virtual_stages={virtual} needs parallel.schedule=interleaved,"
            f" not {parallel.schedule}; set one of them"
        )
    if stages == 1:
        return
    if parallel.schedule == "interleaved" and virtual == 1:
        raise ConfigError(
            "parallel.schedule=interleaved with parallel.virtual_stages=1 is 1f1b; set"
            " parallel.virtual_stages to 2 or more"
        )
    if model.repeats < stages * virtual:
        raise ConfigError(
            f"model.repeats={model.repeats} is below mesh.pipeline={stages} x"
            f" parallel.virtual_stages={virtual}, and each needs a repeat of"
            f" model.pattern; set mesh.pipeline to {model.repeats // virtual or 1} or"
            " less"
        )


def _check_accumulation(config: Config, sizes: Sizes, zero: int) -> None:
    """What gradients that are summed once a step ask for; a pipeline does so anyway."""
    if config.parallel.reduce_once != "true" or sizes.get("pipeline", 1) > 1:
        return
    if config.train.microbatches == 1:
        raise ConfigError(
            "parallel.reduce_once='true' is of several microbatches, and"
            " train.microbatches=1; set it to 2 or more, or parallel.reduce_once to"
            " auto"
        )
    axes = ("data", "fsdp") if zero < 2 else ("data",)
    if all(sizes.get(axis) == 1 for axis in axes):
        given = " and ".join(f"mesh.{axis}=1" for axis in axes)
        raise ConfigError(
            f"parallel.reduce_once='true' is of mesh axes over which a sum of gradients"
            f" is whole, and with zero={zero} and {given} there is none; set mesh.data"
            " to 2 or more, zero to 1 with mesh.fsdp, or parallel.reduce_once to auto"
        )


def _check_split_length(config: Config, sizes: Sizes) -> None:
    """What the way of config.parallel.context asks of rows and heads."""
    way, parts = config.parallel.context, sizes["context"]
    cuts = parts if way == "ulysses" else 2 * parts  # else two chunks a device
    if config.train.length % cuts:
        raise ConfigError(
            f"train.length={config.train.length} does not divide into the {cuts} parts"
            f" of parallel.context={way!r} over mesh axis 'context' of size {parts};"
            f" set train.length to a multiple of {cuts}, or change mesh.context"
        )
    heads = config.model.num_kv_heads // sizes.get("tensor", 1)
    copies = parts // math.gcd(heads, parts)
    if (
        way == "ulysses"
        and config.model.num_heads // config.model.num_kv_heads % copies
    ):
        raise ConfigError(
            f"model.num_heads={config.model.num_heads} with model.num_kv_heads="
            f"{config.model.num_kv_heads} cannot be shared out over mesh axis 'context'"
            f" of size {parts}, which parallel.context='ulysses' does; set"
            " parallel.context to ring, or mesh.context to a divisor of the heads"
        )
