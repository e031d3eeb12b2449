"""Which parameters are trained, frozen or adapted: patterns on paths of a spec tree.

A pattern is one or more whole parts of a path, with `*` and `?` as in file names:
`ffn`, `attention/query`, `pattern/0`, `*norm`.
"""

import fnmatch
import math
from collections.abc import Mapping
from typing import Literal

from jaxinfra import params
from jaxinfra.config import Config, ConfigError, did_you_mean
from jaxinfra.params import ParamSpec, Tree
from jaxinfra.train.optim import STACKS

Role = Literal["trained", "frozen", "adapted"]


def is_match(path: str, pattern: str) -> bool:
    """Whether whole parts of `path`, in a row, are as `pattern` says."""
    return fnmatch.fnmatchcase(f"/{path}/", f"*/{pattern.strip('/')}/*")


def roles(specs: Tree, config: Config) -> Tree:
    """The role of every parameter, a tree like `specs`.

    Raises ConfigError for a pattern that matches nothing, for a rank that is no lower
    than a matrix's own, and where nothing is trained.
    """
    named = dict(params.named(specs))
    found: dict[str, str]
    if config.lora.rank:
        adapted = matrices("lora.targets", config.lora.targets, specs)
        for path in adapted:
            _check_rank(config.lora.rank, path, named[path])
        whole = _matched("lora.whole", config.lora.whole, named)
        found = dict.fromkeys(named, "frozen")
        found |= dict.fromkeys(adapted, "adapted") | dict.fromkeys(whole, "trained")
    else:
        frozen = _matched("train.freeze", config.train.freeze, named)
        found = dict.fromkeys(named, "trained") | dict.fromkeys(frozen, "frozen")
        if len(frozen) == len(named):
            raise ConfigError(
                f"train.freeze={config.train.freeze!r} leaves nothing to train; match "
                "fewer parameters"
            )
    return params.unflatten(specs, list(found.values()))


def matrices(key: str, patterns: str, specs: Tree) -> list[str]:
    """Paths of the matrices that any of the patterns matches; each must match some,
    else ConfigError, which names `key`."""
    named = {path: s for path, s in params.named(specs) if s.kind == "matrix"}
    return _matched(key, patterns, named, "matrix")


def _check_rank(rank: int, path: str, spec: ParamSpec) -> None:
    """A pair of the matrix's own rank would be no smaller than it."""
    one = [n for n, name in zip(spec.shape, spec.axes, strict=True) if name in STACKS]
    rows = math.prod(spec.shape[dim] for dim in spec.contract)
    columns = math.prod(spec.shape) // (rows * math.prod(one))
    if rank >= min(rows, columns):
        raise ConfigError(
            f"lora.rank={rank} must be below the smaller side of every adapted matrix,"
            f" and {path} is {rows} x {columns}; lower it, or name other matrices in"
            " lora.targets"
        )


def _matched(
    key: str, patterns: str, named: Mapping[str, ParamSpec], what: str = "parameter"
) -> list[str]:
    """Paths that any of the patterns matches; each must match some."""
    found = []
    for pattern in patterns.split():
        matched = [path for path in named if is_match(path, pattern)]
        if not matched:
            raise ConfigError(
                f"{key}={patterns!r}: {pattern!r} matches no {what}; there are "
                f"{', '.join(_parts(named))}{did_you_mean(pattern, _parts(named))}"
            )
        found += matched
    return found


def _parts(named: Mapping[str, ParamSpec]) -> list[str]:
    """The parts of all paths but numbers, each once."""
    parts = [part for path in named for part in path.split("/")]
    return [part for part in dict.fromkeys(parts) if not part.isdecimal()]
