"""What composes with what, and why not: one table, checked before jax loads.

`FEATURES` says how a config asks for something, `APART` which two of them cannot be had
together, with the reason and the way out. All other pairs compose: they give the
numbers that each gives alone. `python -m jaxinfra.compositions` prints the table;
rules on sizes, such as what must divide what, are in `checks`.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxinfra.config import TEXT_KEYS, Config, ConfigError

Sizes = Mapping[str, int]  # of mesh axes; the one that takes the rest may be missing


class Feature(NamedTuple):
    """A thing that a config may ask for. setting: what asks for it, as shown. key: the
    one by which it does, if there is one."""

    is_used: Callable[[Config, Sizes], bool]
    setting: Callable[[Config, Sizes], str]
    key: str = ""


class Pair(NamedTuple):
    """Two features that cannot be had together."""

    one: str
    other: str
    why: str
    fix: str


def _axis(name: str) -> Feature:
    return Feature(
        lambda config, sizes: sizes.get(name, 1) > 1,
        lambda config, sizes: f"mesh.{name}={sizes[name]}",
    )


def _context(way: str) -> Feature:
    return Feature(
        lambda config, sizes: (
            sizes.get("context", 1) > 1 and config.parallel.context == way
        ),
        lambda config, sizes: f"parallel.context={way}",
    )


def _precision(*names: str) -> Feature:
    return Feature(
        lambda config, sizes: config.precision in names,
        lambda config, sizes: f"precision={config.precision}",
    )


def _key(key: str, is_used: Callable[[Config], bool]) -> Feature:
    part, name = key.split(".")
    return Feature(
        lambda config, sizes: is_used(config),
        lambda config, sizes: f"{key}={getattr(getattr(config, part), name)}",
        key,
    )


def _has_experts(config: Config) -> bool:
    return config.task == "text" and config.model.has_experts


def _is_dropless(config: Config) -> bool:
    is_way = config.parallel.experts == "dropless" and not config.model.capacity_factor
    return _has_experts(config) and is_way


def _is_bounded(config: Config) -> bool:
    is_way = config.parallel.experts == "dropless" and config.model.capacity_factor > 0
    return _has_experts(config) and is_way


def _is_dense(config: Config) -> bool:
    return _has_experts(config) and config.parallel.experts == "dense"


def _low_traffic(config: Config) -> dict[str, str]:
    ways = {"gather": config.comm.gather, "reduce": config.comm.reduce}
    return {key: kind for key, kind in ways.items() if kind != "compute"}


FEATURES: dict[str, Feature] = {
    "data": _axis("data"),
    "fsdp": _axis("fsdp"),
    "expert": _axis("expert"),
    "ring": _context("ring"),
    "ulysses": _context("ulysses"),
    "all_gather": _context("all_gather"),
    "tensor": _axis("tensor"),
    "pipeline": _axis("pipeline"),
    "slices": _key("mesh.slices", lambda config: config.mesh.slices > 1),
    "dropless": _key("parallel.experts", _is_dropless),
    "bounded": _key("model.capacity_factor", _is_bounded),
    "dense experts": _key("parallel.experts", _is_dense),
    "microbatches": _key(
        "train.microbatches", lambda config: config.train.microbatches > 1
    ),
    "remat": _key("train.remat", lambda config: config.train.remat != "none"),
    "offload": _key("train.remat", lambda config: "offload:" in config.train.remat),
    "dropout": _key("model.dropout", lambda config: config.model.dropout > 0),
    "muon": _key("optimizer.name", lambda config: config.optimizer.name == "muon"),
    "8-bit moments": _key(
        "optimizer.moments", lambda config: config.optimizer.moments == "8bit"
    ),
    "state on host": _key("optimizer.offload", lambda config: config.optimizer.offload),
    "zero 0 or 1": Feature(
        lambda config, sizes: config.zero in (0, 1),
        lambda config, sizes: f"zero={config.zero}",
    ),
    "float16": _precision("float16"),
    "quantized": _precision("fp8", "int8", "mxfp8"),
    "comm": Feature(
        lambda config, sizes: bool(_low_traffic(config)),
        lambda config, sizes: " and ".join(
            f"comm.{key}={kind!r}" for key, kind in _low_traffic(config).items()
        ),
    ),
    "reduce": _key("comm.reduce", lambda config: config.comm.reduce != "compute"),
    "once": _key(
        "parallel.reduce_once", lambda config: config.parallel.reduce_once == "true"
    ),
    "adapters": _key("lora.rank", lambda config: config.lora.rank > 0),
    "freeze": _key("train.freeze", lambda config: bool(config.train.freeze)),
    "aware": _key(
        "train.quantize_aware", lambda config: config.train.quantize_aware != "none"
    ),
    "own task": Feature(
        lambda config, sizes: config.task == "own",
        lambda config, sizes: "a task of its own",
    ),
}

# Values of one key: a config has one of them.
ALTERNATIVES = (
    ("ring", "ulysses", "all_gather"),
    ("dropless", "bounded", "dense experts"),
    ("float16", "quantized"),
)

APART = (
    Pair(
        "pipeline",
        "ring",
        "devices exchange keys all at once, and stages do not attend at the same time",
        "set parallel.context to all_gather or ulysses",
    ),
    Pair(
        "pipeline",
        "own task",
        "it gives a loss, and no layers that could be placed on stages",
        "set mesh.pipeline to 1",
    ),
    Pair(
        "pipeline",
        "offload",
        "its schedule keeps activations in buffers of its own",
        "name them after save: in train.remat, or set mesh.pipeline to 1",
    ),
    *(
        Pair(part, "quantized", "it scales what is trained alone", fix)
        for part, fix in (
            ("adapters", "set precision to bfloat16; lora.base keeps few bits"),
            ("freeze", "set precision to bfloat16"),
        )
    ),
    Pair(
        "aware",
        "quantized",
        "matrices would be rounded twice",
        "set train.quantize_aware to none, or precision to bfloat16",
    ),
    *(
        Pair("aware", part, "it trains all matrices, of which these keep some", fix)
        for part, fix in (
            ("adapters", "set train.quantize_aware to none"),
            ("freeze", "set train.quantize_aware to none"),
        )
    ),
    Pair(
        "adapters",
        "freeze",
        "adapters freeze all else",
        "name what is trained beside them in lora.whole",
    ),
    Pair(
        "dropless",
        "quantized",
        "rows that are grouped by expert are multiplied in compute precision alone",
        "set model.capacity_factor, or parallel.experts to dense",
    ),
    *(
        Pair(
            part,
            "quantized",
            "a precision in few bits gathers what it multiplies",
            "set comm.gather and comm.reduce to compute",
        )
        for part in ("comm", "reduce")
    ),
    *(
        Pair(
            part,
            "zero 0 or 1",
            "parameters and gradients that are not split do not cross",
            "set zero to 3, or 2 for comm.reduce in a pipeline",
        )
        for part in ("comm", "reduce")
    ),
    Pair(
        "muon",
        "8-bit moments",
        "its moments are of another kind than adamw's",
        "set optimizer.moments to float32",
    ),
    Pair(
        "reduce",
        "own task",
        "how it sums its gradients over rows is its own",
        "set comm.reduce to compute",
    ),
    Pair(
        "once",
        "own task",
        "it may look from row to row, which devices with rows of their own cannot",
        "set parallel.reduce_once to auto",
    ),
    Pair(
        "quantized",
        "own task",
        "matmuls of text models alone go in few bits",
        "set precision to bfloat16",
    ),
    Pair(
        "expert",
        "quantized",
        "experts in few bits are multiplied on every device, each by all",
        "set mesh.expert to 1 and give its devices to mesh.fsdp",
    ),
)


def check_compositions(config: Config, sizes: Sizes) -> None:
    """Raises ConfigError for the first pair of `APART` that `config` asks for."""
    for pair in APART:
        one, other = FEATURES[pair.one], FEATURES[pair.other]
        if one.is_used(config, sizes) and other.is_used(config, sizes):
            raise ConfigError(
                f"{one.setting(config, sizes)} does not go with"
                f" {other.setting(config, sizes)}: {pair.why}; {pair.fix}"
            )


def of_the_task() -> list[str]:
    """Features that are of text models, or that a task of one's own reads by itself:
    `options` refuses a key of theirs that TASK_KEYS of the config file does not name.
    """
    is_text = lambda key: key in TEXT_KEYS or key.partition(".")[0] in TEXT_KEYS
    read = [name for name, feature in FEATURES.items() if is_text(feature.key)]
    return [*read, "dropless", "dense experts"]


def table() -> str:
    """Every pair of features: what does not compose has the number of its reason."""
    numbers = {frozenset((p.one, p.other)): str(i) for i, p in enumerate(APART, 1)}
    for names in ALTERNATIVES:
        pairs = itertools.combinations(names, 2)
        numbers |= {frozenset(pair): "or" for pair in pairs}
    for name in of_the_task():
        numbers.setdefault(frozenset((name, "own task")), "t")
    names = list(FEATURES)
    width = max(map(len, names))
    lines = [" " * (width + 3) + " ".join(f"{i:>2}" for i in range(1, len(names)))]
    for row, name in enumerate(names):
        cells = (numbers.get(frozenset((name, other)), "+") for other in names[:row])
        shown = " ".join(f"{cell:>2}" for cell in cells)
        lines.append(f"{row + 1:>2} {name:<{width}}{shown}".rstrip())
    lines += ["", "+ composes", "or: values of one key"]
    lines += ["t: the task does it itself, or it is refused: TASK_KEYS of its file"]
    for i, pair in enumerate(APART, 1):
        lines.append(f"{i} {pair.one} with {pair.other}: {pair.why}; {pair.fix}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
