"""A decoder-only transformer as pure functions over one tree of parameter specs.

The stack is prefix + pattern x repeats + suffix. The repeated layers' parameters are
stored `[repeats, ...]` in layer order, whether they run as a loop or unrolled. Model
code contracts weights only by `ops.einsum` and attends only by `ops.attend`: precision,
sharding, quantization and caches enter there.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import jaxinfra
from jaxinfra import sharding
from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.models.specs import param_specs
from jaxinfra.ops import layers
from jaxinfra.ops.seam import Context, Ops
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Rules


class Model(NamedTuple):
    """A model's specs and its functions; `forward` is made of them.

    prepare(context) -> context, with what all layers share
    embed(params, tokens_BT, context) -> x_BTD
    block(layer_params, x_BTD, context, layer, number, cache) -> (x_BTD, cache); without
      a cache its place is taken by what a layer of experts tells the loss
    unembed(params, x_BTD) -> (normed h_BTD, head_VD); logits are h head^T
    forward(params, tokens_BT, context, caches) -> (h_BTD, head_VD, caches)
    """

    specs: Tree
    prepare: Callable[[Context], Context]
    embed: Callable[..., jax.Array]
    block: Callable[..., tuple[jax.Array, Any]]
    unembed: Callable[..., tuple[jax.Array, jax.Array]]
    forward: Callable[..., tuple[jax.Array, jax.Array, Any]]


def make_model(
    cfg: ModelConfig,
    *,
    ops: Ops,
    policy: Policy,
    rules: Rules,
    remat: str = "none",
    unroll: bool = False,
) -> Model:
    """The transformer of `cfg` (its `vocab_size` resolved). `remat`: as
    `ops.rematerialisation`; `unroll`: layers as a flat program and not a loop."""
    embed = functools.partial(_embed, cfg=cfg, policy=policy, rules=rules)
    block = functools.partial(_block, cfg=cfg, ops=ops)
    # By its public name, which loads the module.
    kept = lambda **how: (
        block if remat == "none" else jaxinfra.rematerialised(block, remat, **how)
    )
    unembed = functools.partial(_unembed, cfg=cfg)
    stack = functools.partial(
        _stack,
        cfg=cfg,
        # A loop's body is not merged with its recomputation anyway.
        looped=kept(prevent_cse=False),
        flat=kept(prevent_cse=True),
        unroll=unroll,
    )

    def prepare(context):
        return context._replace(
            rotations=layers.rotations_of(cfg, context.positions_BT)
        )

    def forward(params, tokens_BT, context, caches=None):
        bias_LE = params.get("router_bias", context.router_bias_LE)
        context = prepare(context)._replace(router_bias_LE=bias_LE)
        x_BTD = embed(params, tokens_BT, context)
        x_BTD, caches = stack(params, x_BTD, context, caches)
        return *unembed(params, x_BTD), caches

    return Model(param_specs(cfg), prepare, embed, block, unembed, forward)


def _embed(params, tokens_BT, context: Context, *, cfg, policy, rules):
    with jax.named_scope("embed"):
        x_BTD = layers.embed(params["embedding"], tokens_BT, policy=policy, rules=rules)
        if cfg.positions == "learned":
            x_BTD += layers.position_rows(
                params["positions"], context.positions_BT, policy=policy, rules=rules
            )
        if cfg.embedding_scale:
            x_BTD *= jnp.asarray(math.sqrt(cfg.width), x_BTD.dtype)
        return _dropout(x_BTD, context, _layer_key(context, cfg.num_layers), cfg)


def _block(params, x_BTD, context, layer: LayerConfig, number, cache, *, cfg, ops):
    """One layer: x + attention(norm(x)), then x + ffn(norm(x)), each norm where its
    parameters are. `number` is the layer's place in the stack (an int or a scalar)."""
    key = _layer_key(context, number)
    attention_key, ffn_key = (None, None) if key is None else jax.random.split(key)
    with jax.named_scope("attention"):
        h_BTD = _norm(params.get("attention_norm"), x_BTD, cfg)
        h_BTD, cache = _attention(
            params["attention"], h_BTD, context, layer, cache, cfg, ops
        )
        h_BTD = _norm(params.get("attention_post_norm"), h_BTD, cfg)
        x_BTD += _dropout(h_BTD, context, attention_key, cfg)
    with jax.named_scope("ffn"):
        h_BTD = _norm(params.get("ffn_norm"), x_BTD, cfg)
        given, einsum = params["ffn"], ops.einsum
        if layer.feed_forward == "dense":
            h_BTD = layers.mlp(given, h_BTD, activation=cfg.activation, einsum=einsum)
        else:
            h_BTD, told = ops.dispatch(given, h_BTD, context, number, einsum=einsum)
            cache = told if cache is None else cache
        h_BTD = _norm(params.get("ffn_post_norm"), h_BTD, cfg)
        x_BTD += _dropout(h_BTD, context, ffn_key, cfg)
    return x_BTD, cache


def _attention(params, x_BTD, context, layer, cache, cfg, ops):
    def project(name, equation, *head_dims):
        out = ("batch", "length", "heads", *head_dims)
        y = ops.einsum(equation, x_BTD, params[name], out=out)
        if cfg.qkv_bias:
            y += params[f"{name}_bias"].astype(y.dtype)
        return y

    q_BTKGH = project("query", "BTD,DKGH->BTKGH", None, None)
    k_BTKH = project("key", "BTD,DKH->BTKH", None)
    v_BTKH = project("value", "BTD,DKH->BTKH", None)
    if cfg.qk_norm != "none":
        norm = functools.partial(layers.rms_norm, eps=cfg.norm_eps)
        q_BTKGH = norm(q_BTKGH, _scale(params["query_norm"], cfg))
        k_BTKH = norm(k_BTKH, _scale(params["key_norm"], cfg))
    if cfg.positions == "rotary":
        angles = context.rotations[layer.rope_theta]
        q_BTKGH, k_BTKH = layers.rope(q_BTKGH, *angles), layers.rope(k_BTKH, *angles)
    if cfg.attention_scale_dim:  # `attend` itself divides by sqrt(H)
        q_BTKGH *= math.sqrt(cfg.head_width / cfg.attention_scale_dim)
    q_BTKGH = checkpoint_name(q_BTKGH, "query")
    k_BTKH = checkpoint_name(k_BTKH, "key")
    v_BTKH = checkpoint_name(v_BTKH, "value")
    a_BTKGH, cache = ops.attend(
        q_BTKGH,
        k_BTKH,
        v_BTKH,
        context,
        cache,
        window=layer.window,
        softcap=cfg.attention_softcap,
    )
    y_BTD = ops.einsum(
        "BTKGH,KGHD->BTD", a_BTKGH, params["out"], out=("batch", "residual", "width")
    )
    if cfg.out_bias:
        y_BTD += params["out_bias"].astype(y_BTD.dtype)
    return checkpoint_name(y_BTD, "attention_out"), cache


def _unembed(params, x_BTD, *, cfg):
    with jax.named_scope("unembed"):
        head_VD = params["embedding"] if cfg.tied else params["head"]
        return _norm(params["final_norm"], x_BTD, cfg), head_VD


def _norm(params, x_BTD, cfg):
    """`x_BTD` normed; as it is where the model has no norm at that place."""
    if params is None:
        return x_BTD
    scale_D = _scale(params["scale"], cfg)
    if cfg.norm == "layernorm":
        return layers.layer_norm(x_BTD, scale_D, params["bias"], eps=cfg.norm_eps)
    return layers.rms_norm(x_BTD, scale_D, eps=cfg.norm_eps)


def _dropout(x_BTD, context, key, cfg):
    settings = {"rate": cfg.dropout, "order_T": context.order_T}
    return layers.dropout(x_BTD, context.rows_B, key, **settings)


def _scale(stored, cfg):
    return 1.0 + stored.astype(jnp.float32) if cfg.norm_from_zero else stored


def _stack(params, x_BTD, context, caches, *, cfg, looped, flat, unroll):
    """All layers in order. caches: {prefix, pattern, suffix}, as the parameters are, or
    None; the result has the same form, of caches or of what layers told."""
    repeated = jax.tree.map(lambda w: whole_stack(w, cfg.repeats), params["pattern"])
    caches = caches or {"prefix": None, "pattern": None, "suffix": None}

    def run(layer_params, configs, first, x_BTD, caches, block=flat):
        caches = caches or [None] * len(configs)
        out = []
        for i, (layer, p, cache) in enumerate(
            zip(configs, layer_params, caches, strict=True)
        ):
            x_BTD, cache = block(p, x_BTD, context, layer, first + i, cache)
            out.append(cache)
        return x_BTD, out

    x_BTD, prefix = run(params["prefix"], cfg.prefix, 0, x_BTD, caches["prefix"])
    first, size = len(cfg.prefix), len(cfg.pattern)

    def turn(carry, xs):
        """One repeat. Caches are carried whole: a loop's results would be a copy."""
        (x_BTD, pattern), (r, layer_params) = carry, xs
        mine = jax.tree.map(
            lambda c: jax.lax.dynamic_index_in_dim(c, r, 0, keepdims=False), pattern
        )
        block = flat if unroll else looped
        x_BTD, mine = run(
            layer_params, cfg.pattern, first + r * size, x_BTD, mine, block
        )
        if pattern is None:
            return (x_BTD, None), mine
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=r, axis=0)
        return (x_BTD, jax.tree.map(put, pattern, mine)), None

    carry = (x_BTD, caches["pattern"])
    if unroll:
        told = []
        for xs in enumerate(_unstack(repeated, cfg.repeats)):
            carry, mine = turn(carry, xs)
            told.append(mine)
        told = jax.tree.map(lambda *each: jnp.stack(each), *told) if told else None
    else:
        xs = (jnp.arange(cfg.repeats), repeated)
        carry, told = jax.lax.scan(turn, carry, xs)
    x_BTD, pattern = carry[0], told if carry[1] is None else carry[1]
    first += size * cfg.repeats
    x_BTD, suffix = run(params["suffix"], cfg.suffix, first, x_BTD, caches["suffix"])
    return x_BTD, {"prefix": prefix, "pattern": pattern, "suffix": suffix}


def whole_stack(w: jax.Array, repeats: int) -> jax.Array:
    """A stacked parameter on every stage of a pipeline, without padded layers."""
    w = jax.reshard(w, sharding.gathered(jax.typeof(w).sharding.spec, "pipeline"))
    return w if w.shape[0] == repeats else w[:repeats]


def _unstack(tree: Tree, repeats: int) -> Sequence[Tree]:
    """The layers of a stacked tree. By `split`: its transpose is one concatenation,
    where indexing's would be a padded array a layer."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [
        [jax.lax.squeeze(x, [0]) for x in jax.lax.split(leaf, [1] * repeats, axis=0)]
        for leaf in leaves
    ]
    return [structure.unflatten(layer) for layer in zip(*parts, strict=True)]


def _layer_key(context: Context, number) -> jax.Array | None:
    return None if context.key is None else jax.random.fold_in(context.key, number)
