"""The small pieces that a layer is made of, in the order in which tokens meet them:
embedding, norms, rotary positions, the feed-forward layer, dropout.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxinfra import mesh, sharding
from jaxinfra.config import ModelConfig, RopeScaling
from jaxinfra.ops import seam
from jaxinfra.ops.seam import Einsum
from jaxinfra.precision import Policy
from jaxinfra.sharding import Axes, Rules

GATED = ("swiglu", "geglu")
_UNSCALED = RopeScaling()
_ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embed(
    table_VD: jax.Array, tokens_BT: jax.Array, policy: Policy, rules: Rules
) -> jax.Array:
    """Rows of `table_VD` for `tokens_BT` (any integer dtype), in compute dtype.

    Each device looks up the ids of its own part of the vocabulary and the parts are
    summed: a plain gather on such a table makes the partitioner replicate the result.
    Gradients are summed in `policy.reduce`. Where ZeRO splits the width, either the
    table travels, or, if a device has fewer tokens than the table has rows, they do:
    each device looks up its columns for all of them and they change places.
    """
    table_spec = jax.typeof(table_VD).sharding.spec
    cut = sharding.zero_axes(table_spec[1])
    does_travel = _do_tokens_travel(table_VD, tokens_BT, rules)

    def body(table_VD, tokens_BT):
        if not does_travel:
            table_VD = sharding.all_gather(table_VD, table_spec)
            return jax.lax.psum(
                _own_rows(table_VD, tokens_BT, rules.vocab), rules.vocab
            )
        tokens_BT = jax.lax.all_gather(tokens_BT, cut, axis=0, tiled=True)
        rows_BTD = _own_rows(table_VD, tokens_BT, rules.vocab)
        x_BTD = jax.lax.psum(rows_BTD, rules.vocab).astype(policy.compute)
        return jax.lax.all_to_all(x_BTD, cut, 0, 2, tiled=True)

    lookup = jax.shard_map(
        body,
        in_specs=(table_spec, sharding.spec(rules, "batch", "length")),
        out_specs=sharding.spec(rules, "batch", "length", "width"),
        check_vma=False,
    )
    x_BTD = lookup(table_VD.astype(policy.reduce), tokens_BT).astype(policy.compute)
    return jax.reshard(x_BTD, sharding.spec(rules, "batch", "residual", "width"))


def _embed_forward(table_VD, tokens_BT, policy, rules):
    return embed(table_VD, tokens_BT, policy, rules), (table_VD, tokens_BT)


def _embed_backward(policy, rules, residuals, dx_BTD):
    """Each device adds to the rows of its own part of the vocabulary. By hand, since a
    device may hold the same dx as others along an axis that splits the table: a
    transposed sum would add these up."""
    table_VD, tokens_BT = residuals
    table_spec = jax.typeof(table_VD).sharding.spec
    dx_spec = sharding.spec(rules, "batch", "length", "width")
    does_travel = _do_tokens_travel(table_VD, tokens_BT, rules)
    token_axes = sharding.axes_here(rules, "batch", "length")
    cut = sharding.zero_axes(table_spec[1])

    def body(table_VD, tokens_BT, dx_BTD):
        axes, whole = token_axes, table_VD
        if does_travel:
            axes = tuple(axis for axis in token_axes if axis not in cut)
            tokens_BT = jax.lax.all_gather(tokens_BT, cut, axis=0, tiled=True)
            dx_BTD = jax.lax.all_to_all(dx_BTD, cut, 2, 0, tiled=True)
        else:
            gather = lambda w_VD: sharding.all_gather(w_VD, table_spec)
            whole = jax.eval_shape(gather, table_VD)
        rows = functools.partial(_own_rows, tokens_BT=tokens_BT, axes=rules.vocab)
        (drows_VD,) = jax.linear_transpose(rows, whole)(dx_BTD.astype(policy.reduce))
        return sharding.all_reduce(drows_VD, table_spec, axes)

    scatter = jax.shard_map(
        body,
        in_specs=(table_spec, sharding.spec(rules, "batch", "length"), dx_spec),
        out_specs=table_spec,
        check_vma=False,
    )
    dx_BTD = jax.reshard(dx_BTD, dx_spec)
    dtable_VD = scatter(table_VD.astype(policy.reduce), tokens_BT, dx_BTD)
    return dtable_VD.astype(table_VD.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


def position_rows(
    table_PD: jax.Array, positions_BT: jax.Array, *, policy: Policy, rules: Rules
) -> jax.Array:
    """Rows of a learned position table, which no axes but ZeRO's split."""
    table_PD = jax.reshard(
        table_PD.astype(policy.reduce),
        sharding.gathered(jax.typeof(table_PD).sharding.spec),
    )
    out_spec = sharding.spec(rules, "batch", "residual", "width")
    return table_PD.at[positions_BT].get(out_sharding=out_spec).astype(policy.compute)


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """Scales the last dims, as many as `scale` has, to unit root mean square, then by
    `scale`.

    Computed in float32, returned in x's dtype. Source: arXiv:1910.07467 eq. 4.
    """
    x32, dims = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    inv_rms = jax.lax.rsqrt(jnp.mean(x32**2, axis=dims, keepdims=True) + eps)
    return (x32 * inv_rms * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, eps: float
) -> jax.Array:
    """Zero mean and unit variance over the last dim, then `scale` and `bias`.

    Computed in float32, returned in x's dtype. Source: arXiv:1607.06450 eq. 3.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inv_std = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
    y = centred * inv_std * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def rope_frequencies(
    head_width: int, theta: float, scaling: RopeScaling = _UNSCALED
) -> np.ndarray:
    """Radians a position, float32 [H/2], falling from 1 to about 1 / theta.

    Source: arXiv:2104.09864 eq. 15; arXiv:2306.15595 (linear); arXiv:2407.21783 section
    3.4.2 and Meta's reference code (llama3).
    """
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    plain_h = (np.float32(theta) ** -exponents).astype(np.float32)
    match scaling.kind:
        case "none":
            return plain_h
        case "linear":
            return plain_h / np.float32(scaling.factor)
        case "llama3":
            turns_h = scaling.original_length * plain_h / (2 * math.pi)
            span = scaling.high_freq - scaling.low_freq
            keep_h = np.clip((turns_h - scaling.low_freq) / span, 0.0, 1.0)
            mixed_h = (1 - keep_h) * plain_h / scaling.factor + keep_h * plain_h
            return mixed_h.astype(np.float32)
        case _:
            assert_never(scaling.kind)


def rotations(
    positions_BT: jax.Array, frequencies_h: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32 [B, T, H/2], for `rope`."""
    # float32: bfloat16 has 8 bits, so position 257 would round to 256.
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies_h
    return jnp.cos(angles), jnp.sin(angles)


def rotations_of(
    cfg: ModelConfig, positions_BT: jax.Array
) -> dict[float, tuple[jax.Array, jax.Array]]:
    """Rotary angles for every base that a layer has, once for all layers; 0 is the
    model's. Empty where positions are learned."""
    if cfg.positions != "rotary":
        return {}
    thetas = sorted({layer.rope_theta for layer in cfg.layers})
    frequencies = {
        theta: rope_frequencies(cfg.head_width, theta)
        if theta
        else rope_frequencies(cfg.head_width, cfg.rope_theta, cfg.rope_scaling)
        for theta in thetas
    }
    return {t: rotations(positions_BT, f) for t, f in frequencies.items()}


@jax.custom_vjp
def rope(x: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of x [B, T, ..., H] by each position's angles.

    Its gradient turns back, and is of x alone. Source: arXiv:2104.09864 eq. 34; halves,
    not neighbours, as published Llama weights expect.
    """
    heads = x.ndim - 3
    shape = (*cos_BTh.shape[:2], *(1,) * heads, cos_BTh.shape[-1])
    cos, sin = cos_BTh.reshape(shape), sin_BTh.reshape(shape)
    if mesh.platform() == "tpu":
        cos, sin = (jnp.concatenate([a, a], axis=-1) for a in (cos, sin))
        return (x.astype(jnp.float32) * cos + _quarter_turn(x) * sin).astype(x.dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _rope_forward(x, cos_BTh, sin_BTh):
    return rope(x, cos_BTh, sin_BTh), (cos_BTh, sin_BTh)


def _rope_backward(angles, g):
    cos_BTh, sin_BTh = angles
    return rope(g, cos_BTh, -sin_BTh), None, None


rope.defvjp(_rope_forward, _rope_backward)


def _quarter_turn(x: jax.Array) -> jax.Array:
    """(first, second) half -> (-second, first), float32, as a product with a matrix of
    0 and +-1, which is exact: a TPU's matrix unit moves half a register's lanes for
    free, where slices of them cost two passes over memory in a layer of Llama-3-8B."""
    half = x.shape[-1] // 2
    one, zero = np.eye(half, dtype=np.float32), np.zeros((half, half), np.float32)
    turn_HH = jnp.asarray(np.block([[zero, one], [-one, zero]]), x.dtype)
    is_full = x.dtype == jnp.float32
    return jnp.matmul(
        x,
        turn_HH,
        precision=jax.lax.Precision.HIGHEST if is_full else None,
        preferred_element_type=jnp.float32,
    )


def mlp(
    params: dict, x_BTD: jax.Array, *, activation: str, einsum: Einsum
) -> jax.Array:
    """x -> act(x up) down, or act(x gate) * (x up) down for the gated ones.

    `params`: up_DF, down_FD, gate_DF if gated, and their biases if biased.
    Source: arXiv:2002.05202 (gated), arXiv:2109.08668 (relu squared).
    """
    hidden = ("batch", "length", "ffn")

    def project(name):
        y_BTF = einsum("BTD,DF->BTF", x_BTD, params[name], out=hidden)
        if f"{name}_bias" in params:
            y_BTF += params[f"{name}_bias"].astype(y_BTF.dtype)
        return checkpoint_name(y_BTF, "ffn_in")

    act_BTF = activate(activation, project)
    y_BTD = einsum(
        "BTF,FD->BTD", act_BTF, params["down"], out=("batch", "residual", "width")
    )
    if "down_bias" in params:
        y_BTD += params["down_bias"].astype(y_BTD.dtype)
    return checkpoint_name(y_BTD, "ffn_out")


def activate(activation: str, project: Callable[[str], jax.Array]) -> jax.Array:
    """act(gate) * up for the gated ones, else act(up), of `project("gate")` and
    `project("up")`."""
    act = _ACTIVATIONS[activation]
    if activation in GATED:
        return act(project("gate")) * project("up")
    return act(project("up"))


def dropout(
    x_BTD: jax.Array,
    rows_B: jax.Array,
    key: jax.Array | None,
    *,
    rate: float,
    order_T: Any = None,
) -> jax.Array:
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate).

    The mask of a row is drawn from fold_in(key, row id): the same on every mesh, for
    every number of microbatches, and for every order of the row's tokens (`order_T` as
    in `seam.Context`). No key or no rate: x itself.
    """
    if key is None or rate == 0.0:
        return x_BTD

    def row_mask(row: jax.Array) -> jax.Array:
        row_key = jax.random.fold_in(key, row)
        return jax.random.bernoulli(row_key, 1.0 - rate, x_BTD.shape[1:])

    kept_BTD = jax.vmap(row_mask)(rows_B)
    if order_T is not None:
        kept_BTD = kept_BTD[:, order_T]
    spec = jax.typeof(x_BTD).sharding.spec
    if spec[1] is not None:  # rows are drawn whole
        kept_BTD = jax.reshard(kept_BTD, spec)
    return jnp.where(kept_BTD, x_BTD / (1.0 - rate), 0).astype(x_BTD.dtype)


def _do_tokens_travel(table_VD, tokens_BT, rules: Rules) -> bool:
    """Whether a device has fewer tokens than rows of a table that ZeRO cuts by width,
    so that these are less on the wire than the table."""
    table_spec = jax.typeof(table_VD).sharding.spec
    tokens_spec = sharding.spec(rules, "batch", "length")
    tokens = math.prod(seam.local_shape(tokens_BT.shape, tokens_spec))
    cut = {*sharding.zero_axes(table_spec[1])}
    is_cut = bool(cut) and cut <= {*rules.batch, *rules.length}
    return is_cut and tokens <= seam.local_shape(table_VD.shape, table_spec)[0]


def _own_rows(table_VD, tokens_BT, axes: Axes) -> jax.Array:
    """Rows of the ids that this device holds, zero for others."""
    start = jax.lax.axis_index(axes) * table_VD.shape[0]
    own_BT = tokens_BT.astype(jnp.int32) - start
    is_own_BT = (own_BT >= 0) & (own_BT < table_VD.shape[0])
    x_BTD = table_VD[jnp.where(is_own_BT, own_BT, 0)]
    return jnp.where(is_own_BT[..., None], x_BTD, 0)
