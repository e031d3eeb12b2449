"""When two configs are one function of their parameters, and its shortest form."""

import dataclasses
import math
from typing import Any

from jaxinfra.config import FOR_TRAINING, LayerConfig, ModelConfig, RopeScaling


def stack(layers: list[LayerConfig]) -> dict[str, Any]:
    """prefix, pattern, repeats and suffix of a list of layers, of which the fewest
    stand alone."""

    def split(first: int, size: int) -> tuple[int, int]:
        """(layers that stand alone, repeats) for a pattern at layers[first:][:size]."""
        repeats = 0
        while (
            layers[first : first + size]
            == layers[first + repeats * size : first + (repeats + 1) * size]
        ):
            repeats += 1
        return len(layers) - size * (repeats - 1), repeats

    places = [(f, s) for f in range(len(layers)) for s in range(1, len(layers) - f + 1)]
    first, size = min(places, key=lambda p: (split(*p)[0], p[0], -p[1]))
    repeats = split(first, size)[1]
    return {
        "prefix": tuple(layers[:first]),
        "pattern": tuple(layers[first : first + size]),
        "repeats": repeats,
        "suffix": tuple(layers[first + size * repeats :]),
    }


def differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Settings in which two models compute otherwise: 'model.width=8 against 16'."""
    a, b = canonical(a), canonical(b)
    found = []
    if len(a.pattern) != len(b.pattern):
        found.append(f"{len(a.pattern)} layers against {len(b.pattern)}")
    else:
        pairs = enumerate(zip(a.pattern, b.pattern, strict=True))
        different = [(i, x, y) for i, (x, y) in pairs if x != y]
        found += [f"layer {i}: {x} against {y}" for i, x, y in different[:1]]
    for field in dataclasses.fields(ModelConfig):
        if field.name == "pattern" or field.name in FOR_TRAINING:
            continue
        one, other = getattr(a, field.name), getattr(b, field.name)
        is_close = isinstance(one, float) and math.isclose(one, other, rel_tol=1e-12)
        if one != other and not is_close:
            found.append(f"model.{field.name}={one} against {other}")
    return found


def canonical(model: ModelConfig) -> ModelConfig:
    """The same function said in one way: widths that 0 stands for, unused settings."""
    has_experts = model.has_experts
    plain, router = ModelConfig(), ("experts_per_token", "router_renormalize", "router")
    sizes = ("num_experts", "router_scale", "router_groups", "router_top_groups")
    no_experts = {
        name: getattr(plain, name) for name in (*router, *sizes, "shared_experts")
    }
    base, scaling, thetas = _rotary(model)
    return dataclasses.replace(
        model,
        head_dim=model.head_width,
        attention_scale_dim=model.attention_scale_dim or model.head_width,
        expert_ffn_width=model.expert_width if has_experts else 0,
        ffn_width=model.ffn_width if _has_dense(model) else 0,
        rope_theta=base,
        rope_scaling=scaling,
        max_length=0 if model.positions == "rotary" else model.max_length,
        prefix=(),
        pattern=tuple(
            dataclasses.replace(layer, rope_theta=theta)
            for layer, theta in zip(model.layers, thetas, strict=True)
        ),
        repeats=1,
        suffix=(),
        **({} if has_experts else no_experts),
    )


def _rotary(model: ModelConfig) -> tuple[float, RopeScaling, list[float]]:
    """The model's rope_theta, its scaling and the layers' rope_theta."""
    if model.positions != "rotary":
        return 0.0, RopeScaling(), [0.0] * model.num_layers
    scaling, thetas = model.rope_scaling, [layer.rope_theta for layer in model.layers]
    if scaling.kind == "linear":
        scaling = RopeScaling(kind="linear", factor=scaling.factor)
    is_scaled = scaling.kind != "none" and scaling.factor != 1
    if is_scaled and not all(thetas):
        return model.rope_theta, scaling, thetas
    # Unscaled, a base is the same wherever it is said: here, the first layer's is the
    # model's.
    thetas = [theta or model.rope_theta for theta in thetas]
    base = thetas[0]
    return base, RopeScaling(), [0.0 if x == base else x for x in thetas]


def _has_dense(model: ModelConfig) -> bool:
    return any(layer.feed_forward == "dense" for layer in model.layers)
