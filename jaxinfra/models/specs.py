"""The parameters of a transformer: one tree of specs, from the config alone."""

import math

import jax

from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.ops import layers
from jaxinfra.params import ParamSpec, Tree, constant, normal


def param_specs(cfg: ModelConfig) -> Tree:
    """The spec tree: embedding, prefix, pattern (stacked), suffix, final norm, head."""
    std = cfg.init_std or 1.0 / math.sqrt(cfg.width)
    table = ("vocab", "embed")
    specs = {
        "embedding": ParamSpec(
            (cfg.vocab_size, cfg.width), table, (), "embedding", normal(std)
        ),
        "prefix": [_layer_specs(cfg, layer) for layer in cfg.prefix],
        "pattern": [
            jax.tree.map(
                lambda spec: spec.stacked(cfg.repeats), _layer_specs(cfg, layer)
            )
            for layer in cfg.pattern
        ],
        "suffix": [_layer_specs(cfg, layer) for layer in cfg.suffix],
        "final_norm": _norm_specs(cfg),
    }
    if cfg.positions == "learned":
        specs["positions"] = ParamSpec(
            (cfg.max_length, cfg.width), (None, "embed"), (), "embedding", normal(std)
        )
    if not cfg.tied:
        specs["head"] = ParamSpec(
            (cfg.vocab_size, cfg.width), table, (1,), "head", normal(std)
        )
    return specs


def _layer_specs(cfg: ModelConfig, layer: LayerConfig) -> Tree:
    """One layer. Query heads are stored by group, [D, K, G, H], so that every head of a
    group and its key head live on one device and no reshape crosses a split dim."""
    D, H = cfg.width, cfg.head_width
    K, G = cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads
    depth = math.sqrt(2 * cfg.num_layers) if cfg.residual_scale_init else 1.0

    def matrix(shape, axes, contract, scale=1.0):
        fan_in = math.prod(shape[dim] for dim in contract)
        std = (cfg.init_std or 1.0 / math.sqrt(fan_in)) / scale
        return ParamSpec(shape, axes, contract, "matrix", normal(std))

    def bias(shape, axes):
        return ParamSpec(shape, axes, (), "vector", constant(0.0))

    heads = ("embed", "heads", None)
    attention = {
        "query": matrix((D, K, G, H), ("embed", "heads", None, None), (0,)),
        "key": matrix((D, K, H), heads, (0,)),
        "value": matrix((D, K, H), heads, (0,)),
        "out": matrix((K, G, H, D), ("heads", None, None, "embed"), (0, 1, 2), depth),
    }
    if cfg.qkv_bias:
        attention["query_bias"] = bias((K, G, H), ("heads", None, None))
        attention["key_bias"] = bias((K, H), ("heads", None))
        attention["value_bias"] = bias((K, H), ("heads", None))
    if cfg.out_bias:
        attention["out_bias"] = bias((D,), (None,))
    match cfg.qk_norm:
        case "head":
            one = _scale_spec(cfg, (H,), (None,))
            attention |= {"query_norm": one, "key_norm": one}
        case "all":
            query = _scale_spec(cfg, (K, G, H), ("heads", None, None))
            key = _scale_spec(cfg, (K, H), ("heads", None))
            attention |= {"query_norm": query, "key_norm": key}
    # An expert layer's arrays have one more dim in front; its router chooses.
    is_dense = layer.feed_forward == "dense"
    F = cfg.ffn_width if is_dense else cfg.expert_width
    E, experts = ((), ()) if is_dense else ((cfg.num_experts,), ("experts",))
    into = (len(E),)  # the dim that is summed over
    ffn = {
        "up": matrix((*E, D, F), (*experts, "embed", "ffn"), into),
        "down": matrix((*E, F, D), (*experts, "ffn", "embed"), into, depth),
    }
    if not is_dense:
        ffn["router"] = matrix((D, *E), ("embed", None), (0,))
    if cfg.activation in layers.GATED:
        ffn["gate"] = matrix((*E, D, F), (*experts, "embed", "ffn"), into)
    if cfg.mlp_bias:
        ffn["up_bias"] = bias((*E, F), (*experts, "ffn"))
        ffn["down_bias"] = bias((*E, D), (*experts, None))
        if cfg.activation in layers.GATED:
            ffn["gate_bias"] = ffn["up_bias"]
    if not is_dense and cfg.shared_experts:  # as one feed-forward of their joint width
        shared_F = cfg.shared_experts * F
        ffn["shared"] = {
            "up": matrix((D, shared_F), ("embed", "ffn"), (0,)),
            "down": matrix((shared_F, D), ("ffn", "embed"), (0,), depth),
        }
        if cfg.activation in layers.GATED:
            ffn["shared"]["gate"] = ffn["shared"]["up"]
    specs = {"attention": attention, "ffn": ffn}
    for part in ("attention", "ffn"):
        if cfg.norm_placement in ("pre", "both"):
            specs[f"{part}_norm"] = _norm_specs(cfg)
        if cfg.norm_placement in ("post", "both"):
            specs[f"{part}_post_norm"] = _norm_specs(cfg)
    return specs


def _norm_specs(cfg: ModelConfig) -> Tree:
    specs = {"scale": _scale_spec(cfg, (cfg.width,), (None,))}
    if cfg.norm == "layernorm":
        specs["bias"] = ParamSpec((cfg.width,), (None,), (), "vector", constant(0.0))
    return specs


def _scale_spec(cfg: ModelConfig, shape, axes) -> ParamSpec:
    start = constant(0.0 if cfg.norm_from_zero else 1.0)
    return ParamSpec(shape, axes, (), "vector", start)
