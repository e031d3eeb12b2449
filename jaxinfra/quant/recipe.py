"""Which matmuls run in which low-bit formats: a recipe is data, chosen by name.

Rules go by the kind of a parameter and by its name. Matrices of blocks are in; the
head, embeddings, vectors (norms, biases) and routers stay in the compute dtype, and so
does what `quant.skip` names.
"""

import dataclasses
import math
import re
from typing import Literal

import jax

from jaxinfra import patterns
from jaxinfra.config import ConfigError, QuantConfig
from jaxinfra.params import Tree, named
from jaxinfra.quant.formats import FORMATS, FormatName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """forward: format of activations and weights. backward: of gradients; None: the
    backward matmuls are in the compute dtype. groups: what shares a scale. by_chance:
    gradients are rounded so that they are right on average. is_delayed: scales follow
    from the largest magnitudes of `history` steps before, and not from this one's.
    """

    forward: FormatName
    backward: FormatName | None
    groups: Literal["tensor", "channel", "block"]
    by_chance: bool = False
    is_delayed: bool = False
    history: int = 16
    figures: bool = True
    skip: str = ""


# Sources: arXiv:2209.05433 (fp8: e4m3 forward, e5m2 gradients, a scale a tensor);
# arXiv:2105.03536 and AQT (int8: a scale a channel, stochastic gradients);
# arXiv:2506.08027 (mxfp8: e4m3 everywhere, blocks of 32, scales rounded up).
_RECIPES = {
    "fp8": Recipe(forward="fp8_e4m3", backward="fp8_e5m2", groups="tensor"),
    "int8": Recipe(forward="int8", backward="int8", groups="channel", by_chance=True),
    "mxfp8": Recipe(forward="mxfp8", backward="mxfp8", groups="block"),
}
# Routers choose: a rounded logit sends a token elsewhere.
ROUTERS = "*router*"


def make_recipe(precision: str, cfg: QuantConfig) -> Recipe:
    """The recipe of `--precision` as the settings change it."""
    recipe = _RECIPES[precision]
    return dataclasses.replace(
        recipe,
        backward=recipe.backward if cfg.backward == "low" else None,
        is_delayed=cfg.scaling == "delayed",
        history=cfg.history,
        figures=cfg.figures,
        skip=cfg.skip,
    )


def chosen(specs: Tree, recipe: Recipe) -> tuple[str, ...]:
    """Paths of the parameters whose matmuls run in low precision.

    Raises ConfigError for a pattern of `quant.skip` that matches none of them, or where
    none is left.
    """
    inside = to_round(specs)
    out = set(patterns.matched("quant.skip", recipe.skip, inside, "matrix"))
    if not (left := tuple(path for path in inside if path not in out)):
        raise ConfigError(
            f"quant.skip={recipe.skip!r} leaves no matrix in low precision; match fewer"
        )
    return left


def to_round(specs: Tree) -> tuple[str, ...]:
    """Paths of the matrices that may be rounded: all but the routers."""
    return tuple(
        path
        for path, spec in named(specs)
        if spec.kind == "matrix" and not patterns.is_match(path, ROUTERS)
    )


def share_of_flops(
    specs: Tree, recipe: Recipe, *, flops_per_token: float, experts_used: float = 1.0
) -> float:
    """Of a step's FLOPs but for the head's, the part that runs in low precision.

    flops_per_token: all, as `facts.train_flops_per_token` counts. experts_used: the
    part of the experts that a token meets.
    """
    names = set(chosen(specs, recipe))

    def flops(spec) -> float:
        used = experts_used if "experts" in spec.axes else 1.0
        return 6.0 * math.prod(spec.shape) * used

    low = sum(flops(spec) for path, spec in named(specs) if path in names)
    heads = [spec for spec in jax.tree.leaves(specs) if spec.kind == "head"]
    tied = [spec for spec in jax.tree.leaves(specs) if "vocab" in spec.axes]
    head = sum(map(flops, heads or tied))
    matmuls = 3 if recipe.backward else 1
    return low * matmuls / 3 / (flops_per_token - head)


def has_units(device: jax.Device, format: FormatName) -> bool:
    """Whether matmuls of this format run on the device's own units through XLA.

    Sources: cloud.google.com TPU pages (int8 from v5e on), CUDA's table of compute
    capabilities (fp8 from 8.9 on, int8 from 7.5 on).
    """
    if FORMATS[format].block:
        return False
    is_int8 = format == "int8"
    match device.platform:
        case "tpu":
            kinds = ("TPU v5", "TPU v6", "TPU7", "TPU v7") if is_int8 else ("TPU7",)
            return device.device_kind.startswith(kinds)
        case "gpu" | "cuda":
            found = re.fullmatch(r"(\d+)\.(\d+)", str(device.compute_capability))
            capability = tuple(map(int, found.groups())) if found else (0, 0)
            return capability >= ((7, 5) if is_int8 else (8, 9))
        case _:
            return False
