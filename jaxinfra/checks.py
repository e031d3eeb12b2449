"""Every rule between settings that needs no device and no jax.

`check` raises ConfigError at the first broken rule, in the words `key=value what rule;
what to set`. What only the devices tell is checked by `resolve_mesh`, once they are
counted.
"""

import math
import os
import re
from collections.abc import Callable, Iterable

import jaxinfra
from jaxinfra import stages
from jaxinfra.config import (
    AXES,
    Config,
    ConfigError,
    DataConfig,
    did_you_mean,
    without_secrets,
)

MAX_INT = 2**31 - 1  # steps, ids and positions are int32 on the device
SHIPPED_TEXT = "shakespeare"
# Keys whose rules are in `feature_checks` and `compositions`.
_FEATURES = (
    "precision", "quant", "comm", "optimizer.moments", "lora", "train.freeze",
    "train.quantize_aware", "train.quantize_group", "parallel", "checkpoint.keep_best",
    "runtime.num_processes", "runtime.process_id", "runtime.coordinator", "mesh.slices",
)  # fmt: skip

# Rule in words -> (rule, keys). Every number of the config is in one row, by a test.
RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda x: x >= 1,
        (
            "run.log_every", "model.width", "model.ffn_width", "model.num_heads",
            "model.num_kv_heads", "train.batch_size", "train.length",
            "train.microbatches", "train.save_every", "train.max_bad_steps",
            "mesh.slices", "parallel.virtual_stages", "runtime.num_processes",
            "checkpoint.keep", "quant.history",
        ),
    ),
    "at least 0": (
        lambda x: x >= 0,
        (
            "model.vocab_size", "model.head_dim", "model.repeats", "model.max_length",
            "model.attention_softcap", "model.logit_softcap", "model.init_std",
            "model.num_experts", "model.experts_per_token", "model.expert_ffn_width",
            "model.attention_scale_dim", "model.router_groups",
            "model.router_top_groups", "model.shared_experts", "model.capacity_factor",
            "train.balance_loss", "train.router_z_loss", "train.router_bias_rate",
            "train.steps",
            "train.max_secs", "train.loss_chunk", "train.z_loss",
            "optimizer.learning_rate", "optimizer.adam_learning_rate",
            "optimizer.warmup_steps",
            "optimizer.weight_decay", "optimizer.clip_norm", "eval.every",
            "eval.batches", "eval.batch_size", "runtime.cpu_devices",
            "runtime.process_id", "data.prefetch", "runtime.devices",
            "data.shuffle_block", "checkpoint.keep_every", "checkpoint.keep_best",
            "checkpoint.keep_hours", "checkpoint.staging_gib",
            "profile.start", "profile.steps",
            "sample.tokens", "sample.temperature", "sample.top_k",
            "lora.rank", "lora.group", "train.quantize_group",
        ),
    ),
    "above 0": (
        lambda x: x > 0,
        (
            "data.cache_gib",
            "model.norm_eps", "model.rope_theta", "model.rope_scaling.factor",
            "model.rope_scaling.low_freq", "model.rope_scaling.high_freq",
            "model.rope_scaling.original_length", "model.router_scale",
            "optimizer.eps", "lora.alpha",
        ),
    ),
    "at least 0 and below 1": (
        lambda x: 0 <= x < 1,
        (
            "model.dropout", "data.held_out", "optimizer.beta1", "optimizer.beta2",
            "optimizer.momentum", "optimizer.ema_decay", "train.label_smoothing",
        ),
    ),
    "from 0 to 1": (
        lambda x: 0 <= x <= 1,
        ("optimizer.final_fraction", "optimizer.decay_fraction"),
    ),
    "above 0 and at most 1": (lambda x: 0 < x <= 1, ("sample.top_p",)),
    "from 0 to 4294967295": (lambda x: 0 <= x < 2**32, ("run.seed",)),
    "-1, 0, 1, 2 or 3": (lambda x: -1 <= x <= 3, ("zero",)),
    "at least 1, or -1 for the devices that are left": (
        lambda x: x >= 1 or x == -1,
        tuple(f"mesh.{axis}" for axis in AXES),
    ),
}  # fmt: skip


def check(config: Config, *, vocab_size: int | None = None) -> None:
    """Raises ConfigError at the first broken rule; `vocab_size` is the tokenizer's.

    The mesh is checked as far as the settings tell the number of devices: call
    `resolve_mesh` with the real number too.
    """
    _check_ranges(config)
    if config.task == "text":
        _check_model(config)
        _check_vocabulary(config, vocab_size)
        if config.train.remat not in ("none", "full", "dots"):
            jaxinfra.remat_names(config.train.remat)
    _check_training(config)
    _check_runtime(config)
    _check_available(config)
    _check_mesh(config)
    _check_paths(config)


def resolve_mesh(config: Config, device_count: int) -> dict[str, int]:
    """Size of every axis on `device_count` devices, the -1 filled in.

    Raises ConfigError when they do not fit, or when a dim or the batch does not divide.
    """
    sizes = _axis_sizes(config)
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = [axis for axis in sizes if sizes[axis] == -1]
    if device_count % known or (not rest and device_count != known):
        given = {f"mesh.{axis}": n for axis, n in sizes.items() if n not in (-1, 1)}
        rule = "divides" if rest else "is"
        raise ConfigError(
            f"{_listed(given) or 'the mesh'} takes {known} devices of {device_count};"
            f" set {' or '.join(given) or 'mesh.data'} so that the product {rule}"
            f" {device_count}"
            + ("" if rest else ", or one axis to -1 to take the rest")
        )
    sizes |= dict.fromkeys(rest, device_count // known)
    _check_features(config, sizes)
    return sizes


def resolve_zero(config: Config) -> int:
    """What the fsdp axis shards, 0 to 3: -1 is 3, or 1 with a pipeline.

    A pipeline keeps a stage's parameters whole from its first microbatch to its last,
    so 3 would gather them all at once and save memory only between steps.
    """
    if config.zero != -1:
        return config.zero
    return 3 if config.mesh.pipeline == 1 else 1


def known_device_count(config: Config) -> int:
    """The number of devices that the settings tell, 0 if they do not."""
    runtime = config.runtime
    simulated = runtime.cpu_devices * runtime.num_processes
    if simulated and runtime.devices not in (0, simulated):
        raise ConfigError(
            f"runtime.devices={runtime.devices} is not runtime.cpu_devices="
            f"{runtime.cpu_devices} x runtime.num_processes={runtime.num_processes};"
            f" set runtime.devices to {simulated} or 0"
        )
    return simulated or runtime.devices


def _check_ranges(config: Config) -> None:
    for rule, (is_good, keys) in RANGES.items():
        for key in keys:
            value = _get(config, key)
            if not is_good(value):
                raise ConfigError(f"{key}={value} must be {rule}")
            if value > MAX_INT and key != "run.seed":
                raise ConfigError(f"{key}={value} must be at most {MAX_INT}")
    rest = [axis for axis, size in _axis_sizes(config).items() if size == -1]
    if len(rest) > 1:
        given = _listed({f"mesh.{axis}": -1 for axis in rest})
        raise ConfigError(
            f"{given}: one axis alone can take the rest; set mesh.{rest[1]} to 1"
        )


def _check_model(config: Config) -> None:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads="
            f"{model.num_heads}; set model.num_kv_heads to"
            f" {_divisors(model.num_heads)}"
        )
    if not model.head_dim and model.width % model.num_heads:
        raise ConfigError(
            f"model.num_heads={model.num_heads} does not divide model.width="
            f"{model.width}; change one of them, or set model.head_dim"
        )
    if model.positions == "rotary" and model.head_width % 2:
        raise ConfigError(
            f"a head of width {model.head_width} is odd, and rotary positions turn"
            " pairs; set model.head_dim to an even number"
        )
    if model.positions == "learned" and model.max_length < config.train.length:
        raise ConfigError(
            f"model.max_length={model.max_length} is below train.length="
            f"{config.train.length}, and learned positions end there; set"
            f" model.max_length to {config.train.length} or more"
        )
    if not (model.prefix or model.suffix or (model.pattern and model.repeats)):
        raise ConfigError(
            "the model has no layer; set model.repeats to 1 or more and model.pattern"
            " to a list of layers"
        )
    for part in ("prefix", "pattern", "suffix"):
        for i, layer in enumerate(getattr(model, part)):
            for name in ("window", "rope_theta"):
                value = getattr(layer, name)
                if not 0 <= value <= MAX_INT:
                    raise ConfigError(
                        f"model.{part}[{i}].{name}={value} must be from 0 to {MAX_INT}"
                    )
    scaling = model.rope_scaling
    if scaling.kind == "llama3" and scaling.high_freq <= scaling.low_freq:
        raise ConfigError(
            f"model.rope_scaling.high_freq={scaling.high_freq} must be above"
            f" model.rope_scaling.low_freq={scaling.low_freq}; swap them"
        )
    if model.experts_per_token > model.num_experts:
        raise ConfigError(
            f"model.experts_per_token={model.experts_per_token} is above"
            f" model.num_experts={model.num_experts}; set it to a number up to that"
        )
    if model.has_experts and not model.experts_per_token:
        raise ConfigError(
            "a layer has feed_forward='experts', but model.experts_per_token=0; set"
            " model.num_experts and model.experts_per_token"
        )
    if groups := model.router_groups:
        top, size = model.router_top_groups, model.num_experts // groups
        if model.num_experts % groups or not 0 < top <= groups:
            raise ConfigError(
                f"model.router_groups={groups} must divide model.num_experts="
                f"{model.num_experts}, and model.router_top_groups={top} be from 1 to"
                " it; change one of them, or set model.router_groups to 0"
            )
        if top * size < model.experts_per_token:
            raise ConfigError(
                f"model.router_top_groups={top} groups have {top * size} experts, fewer"
                f" than model.experts_per_token={model.experts_per_token}; raise it"
            )


def _check_vocabulary(config: Config, vocab_size: int | None) -> None:
    ours = config.model.vocab_size
    if vocab_size and 0 < ours < vocab_size:
        raise ConfigError(
            f"model.vocab_size={ours} is below the tokenizer's {vocab_size}; set it to"
            f" {vocab_size} or more, or to 0 to take the tokenizer's"
        )


def _check_training(config: Config) -> None:
    train, data = config.train, config.data
    for size in stages.BatchSizes(train.batch_size, train.batch_ramp).sizes[::-1]:
        if size % train.microbatches:
            key = "batch_size" if size == train.batch_size else "batch_ramp"
            raise ConfigError(
                f"train.microbatches={train.microbatches} does not divide train.{key}="
                f"{size}; set train.microbatches to {_divisors(size)}"
            )
    for name, text in data.weights.items():
        stages.parse(text, key=f"data.weights.{name}")
    if data.weights and data.weights.keys() != data.sets.keys():
        raise ConfigError(
            f"data.weights are of {_names(data.weights)} and data.sets of"
            f" {_names(data.sets)}; give each set a weight, or none at all"
        )
    if data.sets and data.path != DataConfig().path:
        raise ConfigError(
            f"data.path={data.path!r} and data.sets are both given; name it in"
            " data.sets too, or leave one of them out"
        )
    if config.optimizer.schedule == "exponential" and not (
        config.optimizer.final_fraction
    ):
        raise ConfigError(
            "optimizer.schedule='exponential' never comes to optimizer.final_fraction="
            "0; set optimizer.final_fraction above 0"
        )


def _check_runtime(config: Config) -> None:
    runtime = config.runtime
    for part in filter(None, runtime.compiler_options.split(",")):
        if not re.fullmatch(r"none|xla_[a-z0-9_]+=\S*", part):
            raise ConfigError(
                f"runtime.compiler_options: {part!r} is no option; write"
                " xla_name=value, xla_name= to drop one, or none to drop all, with"
                " commas between"
            )


def _check_available(config: Config) -> None:
    """Refuses what a config can say and this version cannot do."""
    if "://" in (value := config.data.cache_dir):
        raise _not_here(
            f"data.cache_dir={value!r}", "a remote cache", "set it to a local path"
        )


def _check_features(config: Config, sizes: dict[str, int]) -> None:
    """What has rules of its own, which most runs, on one device, do not ask for."""
    plain = Config(name="plain")
    if max(sizes.values(), default=1) > 1 or any(
        _get(config, key) != _get(plain, key) for key in _FEATURES
    ):
        jaxinfra.check_features(config, sizes, resolve_zero(config))
        jaxinfra.check_compositions(config, sizes)
        jaxinfra.check_divisible(config, sizes, resolve_zero(config))


def _check_mesh(config: Config) -> None:
    if count := known_device_count(config):
        resolve_mesh(config, count)
        return
    sizes = {axis: n for axis, n in _axis_sizes(config).items() if n != -1}
    _check_features(config, sizes)


def _check_paths(config: Config) -> None:
    data, run = config.data, config.run
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", config.name):
        raise ConfigError(
            f"name={config.name!r} names the run folder; use letters, digits and _ . -"
        )
    if config.task == "text" and data.path != SHIPPED_TEXT:
        _check_exists("data.path", data.path, known=[SHIPPED_TEXT])
    if config.task == "text" and data.tokenizer not in ("byte", "char"):
        _check_exists("data.tokenizer", data.tokenizer, known=["byte", "char"])
    if (source := config.init.from_) and not os.path.exists(source):
        run_dir, at, step = source.rpartition("@")
        is_step = at and step.isdecimal()
        _check_exists("init.from", run_dir if is_step else source)
    if config.init.model and not config.init.from_:
        raise ConfigError(
            "init.model=true takes the model of init.from, which is empty; set it"
        )
    is_url = "://" in run.dir
    if is_url and not re.fullmatch(r"(s3|gs)://[^@/]{3,}(/.*)?", run.dir):
        scheme = run.dir.partition("://")[0]
        raise ConfigError(
            f"run.dir={scheme}://... must be a path, s3://bucket/folder or gs://bucket/"
            f"folder, without a user or a key in it{did_you_mean(scheme, ('s3', 'gs'))}"
        )
    if is_url and config.profile.steps:
        raise ConfigError(
            f"profile.steps={config.profile.steps} writes to a local run.dir alone; "
            "set it to 0, or run.dir to a path"
        )
    local = {"run.dir": "" if is_url else run.dir, "data.cache_dir": data.cache_dir}
    for key, path in local.items():
        file = _first_existing(path)
        if not os.path.isdir(file):
            raise ConfigError(
                f"{key}={path!r} cannot be made a folder: {file!r} is a file; set {key}"
                " to another path"
            )
    sets = {f"data.sets.{name}": path for name, path in data.sets.items()}
    sets |= {f"eval.sets.{name}": path for name, path in config.eval.sets.items()}
    for key, path in sets.items():
        _check_exists(key, path)
        if not re.fullmatch(r"[a-z0-9_]+", name := key.split(".", 2)[2]):
            raise ConfigError(
                f"{key}: {name!r} names a metric; use a-z, 0-9 and _, as in"
                " --eval.sets.bible PATH"
            )
        if name.startswith("held_out"):
            raise ConfigError(
                f"{key}: held_out is the data's own held-out split; take another name"
            )


def _check_exists(key: str, path: str, known: Iterable[str] = ()) -> None:
    # Models and tokenizers are read from folders, which may be in a bucket.
    is_folder = key in ("data.tokenizer", "init.from")
    is_url = path.startswith(("s3://", "gs://")) or ("://" in path and not is_folder)
    if path and (is_url or os.path.exists(os.path.expanduser(path))):
        return  # what a server has is known when it is asked
    folder = os.path.dirname(path)
    try:
        beside = os.listdir(os.path.expanduser(folder) or ".")
    except (OSError, ValueError):
        beside = []
    near = did_you_mean(path, known)
    near = near or did_you_mean(path, [os.path.join(folder, file) for file in beside])
    also = "".join(f", or {name!r}" for name in known)
    raise ConfigError(
        f"{key}={without_secrets(path)!r} is not there; give a path that "
        f"exists{also}{near}"
    )


def _first_existing(path: str) -> str:
    """The path, or the nearest folder above it that is there."""
    path = os.path.abspath(os.path.expanduser(path))
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def _get(config: Config, key: str):
    value = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _axis_sizes(config: Config) -> dict[str, int]:
    return {axis: getattr(config.mesh, axis) for axis in AXES}


def _not_here(setting: str, what: str, fix: str) -> ConfigError:
    return ConfigError(f"{setting}: {what} is not part of this version; {fix}")


def _listed(settings: dict[str, int]) -> str:
    return " x ".join(f"{key}={value}" for key, value in settings.items())


def _names(settings: Iterable[str]) -> str:
    return ", ".join(sorted(settings)) or "no set"


def _divisors(n: int) -> str:
    """The divisors of n in words; all of them where they are few."""
    found = [d for d in range(1, min(n, 4096) + 1) if n % d == 0]
    return (
        f"one of {', '.join(map(str, found))}"
        if len(found) < 9
        else (f"a divisor of {n}")
    )
