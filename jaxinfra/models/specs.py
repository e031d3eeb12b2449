"""The parameters of a transformer: one tree of specs, from the config alone."""

import math

import jax

from jaxinfra.config import ModelConfig
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
        "prefix": [_layer_specs(cfg) for _ in cfg.prefix],
        "pattern": [
            jax.tree.map(lambda spec: spec.stacked(cfg.repeats), _layer_specs(cfg))
            for _ in cfg.pattern
        ],
        "suffix": [_layer_specs(cfg) for _ in cfg.suffix],
        "final_norm": _norm_specs(cfg, cfg.width),
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


def _layer_specs(cfg: ModelConfig) -> Tree:
    """One layer. Query heads are stored by group, [D, K, G, H], so that every head of a
    group and its key head live on one device and no reshape crosses a split dim."""
    D, F, H = cfg.width, cfg.ffn_width, cfg.head_width
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
    if cfg.qk_norm:
        one = ParamSpec((H,), (None,), (), "vector", constant(1.0))
        attention |= {"query_norm": one, "key_norm": one}
    ffn = {
        "up": matrix((D, F), ("embed", "ffn"), (0,)),
        "down": matrix((F, D), ("ffn", "embed"), (0,), depth),
    }
    if cfg.activation in layers.GATED:
        ffn["gate"] = matrix((D, F), ("embed", "ffn"), (0,))
    if cfg.mlp_bias:
        ffn |= {"up_bias": bias((F,), ("ffn",)), "down_bias": bias((D,), (None,))}
    return {
        "attention_norm": _norm_specs(cfg, D),
        "attention": attention,
        "ffn_norm": _norm_specs(cfg, D),
        "ffn": ffn,
    }


def _norm_specs(cfg: ModelConfig, size: int) -> Tree:
    specs = {"scale": ParamSpec((size,), (None,), (), "vector", constant(1.0))}
    if cfg.norm == "layernorm":
        specs["bias"] = ParamSpec((size,), (None,), (), "vector", constant(0.0))
    return specs
