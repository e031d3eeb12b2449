"""Which parameters are trained, frozen or adapted, by `patterns` on their paths."""

from typing import Literal

from jaxinfra import params, patterns
from jaxinfra.config import Config, ConfigError
from jaxinfra.params import Tree

Role = Literal["trained", "frozen", "adapted"]


def roles(specs: Tree, config: Config) -> Tree:
    """The role of every parameter, a tree like `specs`.

    Raises ConfigError for a pattern that matches nothing, or where nothing is trained.
    """
    named = dict(params.named(specs))
    found: dict[str, str]
    if config.lora.rank:
        adapted = matrices("lora.targets", config.lora.targets, specs)
        whole = patterns.matched("lora.whole", config.lora.whole, named)
        found = dict.fromkeys(named, "frozen")
        found |= dict.fromkeys(adapted, "adapted") | dict.fromkeys(whole, "trained")
    else:
        frozen = patterns.matched("train.freeze", config.train.freeze, named)
        found = dict.fromkeys(named, "trained") | dict.fromkeys(frozen, "frozen")
        if len(frozen) == len(named):
            raise ConfigError(
                f"train.freeze={config.train.freeze!r} leaves nothing to train; match "
                "fewer parameters"
            )
    return params.unflatten(specs, list(found.values()))


def matrices(key: str, wanted: str, specs: Tree) -> list[str]:
    """Paths of the matrices that any of the patterns matches; each must match some,
    else ConfigError, which names `key`."""
    named = {path: s for path, s in params.named(specs) if s.kind == "matrix"}
    return patterns.matched(key, wanted, named, "matrix")
