"""Which experts a token meets, what its row tells of that, and the plain way to meet
them.

A layer with experts is a choice (`choose`) and a dispatch. The choice is computed in
float32 for whole rows: capacity, the balance loss and every other figure are of one
row, so that neither mesh nor microbatches nor stages change a number. The dispatches
that move tokens between devices are in `parallel.expert`; they all give the numbers of
`dense` here.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxinfra import sharding
from jaxinfra.config import ModelConfig
from jaxinfra.ops import layers, seam
from jaxinfra.ops.seam import Context, Einsum
from jaxinfra.sharding import Rules


class Choice(NamedTuple):
    """The experts of every token.

    ids_BTk: int32. gates_BTk: float32, the share of each in the result; zero where the
    expert had no room. ranks_BTk: place in the expert's queue within the row, int32;
    None where there is room for all.
    """

    ids_BTk: jax.Array
    gates_BTk: jax.Array
    ranks_BTk: jax.Array | None


class Told(NamedTuple):
    """What one layer of experts tells the loss: float32, of every row, in units of its
    targets.

    A mean over the row's targets times their number: balance_B (1 where all experts are
    used alike), z_B (squared log-sum-exp of the router), entropy_B (nats), dropped_B
    (part of the choices), busiest_B (tokens of the fullest expert, 1 is the mean).
    load_BE: targets that chose each expert.
    """

    balance_B: jax.Array
    z_B: jax.Array
    entropy_B: jax.Array
    dropped_B: jax.Array
    busiest_B: jax.Array
    load_BE: jax.Array


def choose(
    params: dict,
    x_BTD: jax.Array,
    context: Context,
    bias_E: jax.Array | None,
    *,
    cfg: ModelConfig,
    einsum: Einsum,
    rules: Rules,
) -> tuple[Choice, Told | None]:
    """The experts of every token by `params["router"]`, and what the loss is told of
    it, where the loss has said which tokens are targets.

    `bias_E` moves which experts are chosen and no share (arXiv:2408.15664). `einsum`
    is float32's.
    """
    logits_BTE = einsum(
        "BTD,DE->BTE",
        x_BTD.astype(jnp.float32),
        params["router"],
        out=("batch", "length", None),
    )
    ids_BTk, gates_BTk, probs_BTE = route(logits_BTE, bias_E, cfg=cfg)
    ranks_BTk = None
    if cfg.capacity_factor and context.weights_BT is not None:
        ranks_BTk = queue(ids_BTk, context.order_T, rules=rules)
        has_room_BTk = ranks_BTk < capacity(cfg, x_BTD.shape[1])
        gates_BTk = jnp.where(has_room_BTk, gates_BTk, 0.0)
    choice = Choice(ids_BTk, gates_BTk, ranks_BTk)
    if context.weights_BT is None:
        return choice, None
    return choice, _tell(logits_BTE, probs_BTE, choice, context.weights_BT, cfg)


def route(
    logits_BTE: jax.Array, bias_E: jax.Array | None, *, cfg: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids_BTk, gates_BTk, probs_BTE) of float32 logits: the likeliest experts first,
    of equal ones the lower number.

    softmax: shares are probabilities (arXiv:2401.04088 section 2.1). sigmoid: each
    expert's own score, and with router_groups only experts of the groups whose two best
    sum highest are taken (arXiv:2412.19437 section 2.1.2). Either is made to sum to 1
    if router_renormalize, then multiplied by router_scale. probs_BTE sum to 1.
    """
    if cfg.router == "softmax":
        scores_BTE = probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    else:
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        probs_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
    wanted_BTE = scores_BTE if bias_E is None else scores_BTE + bias_E
    wanted_BTE = jax.lax.stop_gradient(wanted_BTE)
    if cfg.router_groups:
        wanted_BTE = _of_best_groups(
            wanted_BTE, cfg.router_groups, cfg.router_top_groups
        )
    _, ids_BTk = jax.lax.top_k(wanted_BTE, cfg.experts_per_token)
    # By a masked sum: its transpose is a product, where a gather's would be a scatter.
    gates_BTk = jnp.sum(_one_hot(ids_BTk, cfg) * scores_BTE[..., None, :], axis=-1)
    if cfg.router_renormalize:
        gates_BTk /= jnp.sum(gates_BTk, axis=-1, keepdims=True)
    return ids_BTk, gates_BTk * cfg.router_scale, probs_BTE


def capacity(cfg: ModelConfig, length: int) -> int:
    """Tokens that an expert takes of a row."""
    even = length * cfg.experts_per_token / cfg.num_experts
    return min(length, max(1, math.ceil(even * cfg.capacity_factor)))


def queue(ids_BTk: jax.Array, order_T: Any, *, rules: Rules) -> jax.Array:
    """Place of every choice in its expert's queue of the row, in order of position;
    `order_T` as in `Context`."""
    rows = sharding.spec(rules, "batch", "length", None)
    whole = sharding.spec(rules, "batch", None, None)

    def local(ids_BTk):
        if order_T is None:
            return jax.vmap(_ranks)(ids_BTk)
        place_T = jnp.argsort(order_T)
        return jax.vmap(_ranks)(ids_BTk[:, place_T])[:, order_T]

    ranks = jax.shard_map(local, in_specs=whole, out_specs=whole)
    return jax.reshard(ranks(jax.reshard(ids_BTk, whole)), rows)


def dense(
    params: dict,
    x_BTD: jax.Array,
    choice: Choice,
    *,
    cfg: ModelConfig,
    einsum: Einsum,
) -> jax.Array:
    """Every expert on every token, times its share: [B, T, D].

    Limits: E / k times the work that is needed, [B, T, E, F] activations, and every
    expert on every device: for small models, and as the oracle of the other ways.
    """
    hidden = ("batch", "length", None, "ffn")
    contract = seam.opened(
        lambda equation, x, w, *, out: einsum(equation, x, on_all(w), out=out)
    )

    def project(name):
        y_BTEF = contract("BTD,EDF->BTEF", x_BTD, params[name], out=hidden)
        if f"{name}_bias" in params:
            y_BTEF += on_all(params[f"{name}_bias"]).astype(y_BTEF.dtype)
        return checkpoint_name(y_BTEF, "ffn_in")

    act_BTEF = layers.activate(cfg.activation, project)
    gates_BTE = gates_of_all(choice, cfg).astype(act_BTEF.dtype)
    return contract(
        "BTEF,EFD->BTD",
        act_BTEF * gates_BTE[..., None],
        params["down"],
        out=("batch", "length", "width"),
    )


def gates_of_all(choice: Choice, cfg: ModelConfig) -> jax.Array:
    """float32 [B, T, E]: the share of every expert, zero for those not chosen."""
    return jnp.sum(_one_hot(choice.ids_BTk, cfg) * choice.gates_BTk[..., None], axis=-2)


def on_all(w: jax.Array) -> jax.Array:
    """Experts' parameters, whole over `expert`: of a tree those arrays alone that are
    split by expert, and not what it has by row."""

    def one(x: jax.Array) -> jax.Array:
        spec = jax.typeof(x).sharding.spec
        if "expert" not in tuple(spec):
            return x
        return jax.reshard(x, sharding.gathered(spec, "expert"))

    return jax.tree.map(one, w)


def moved_bias(bias_LE: jax.Array, load_LE: jax.Array, *, rate: float) -> jax.Array:
    """The next router biases: lower by `rate` where an expert had more than the mean of
    its layer, higher where less. Source: arXiv:2408.15664 algorithm 1."""
    mean_L1 = jnp.mean(load_LE, axis=-1, keepdims=True)
    return bias_LE + rate * jnp.sign(mean_L1 - load_LE)


def _of_best_groups(wanted_BTE: jax.Array, groups: int, top: int) -> jax.Array:
    """`wanted_BTE`, and -inf outside the `top` groups whose two best sum highest."""
    *rows, E = wanted_BTE.shape
    wanted_BTGe = wanted_BTE.reshape(*rows, groups, E // groups)
    best_BTG2, _ = jax.lax.top_k(wanted_BTGe, min(2, E // groups))
    _, ids_BTg = jax.lax.top_k(jnp.sum(best_BTG2, axis=-1), top)
    is_best_BTG = jnp.any(ids_BTg[..., None] == jnp.arange(groups), axis=-2)
    kept_BTGe = jnp.where(is_best_BTG[..., None], wanted_BTGe, -jnp.inf)
    return kept_BTGe.reshape(*rows, E)


def _tell(logits_BTE, probs_BTE, choice, weights_BT, cfg) -> Told:
    k, E = cfg.experts_per_token, cfg.num_experts
    total_B = jnp.sum(weights_BT, axis=1)
    sum_of = lambda x_BT: jnp.sum(weights_BT * x_BT, axis=1)
    chosen_BTE = jnp.sum(_one_hot(choice.ids_BTk, cfg), axis=-2)
    load_BE = jnp.sum(weights_BT[..., None] * chosen_BTE, axis=1)
    probs_BE = jnp.sum(weights_BT[..., None] * probs_BTE, axis=1)
    share_BE = load_BE * E / (k * jnp.maximum(total_B, 1.0)[:, None])  # 1 is the mean
    log_BTE = jnp.log(jnp.maximum(probs_BTE, jnp.finfo(jnp.float32).tiny))
    dropped_BT = jnp.zeros_like(weights_BT)
    if choice.ranks_BTk is not None:
        room = capacity(cfg, weights_BT.shape[1])
        dropped_BT = jnp.mean((choice.ranks_BTk >= room).astype(jnp.float32), axis=-1)
    return Told(
        balance_B=jnp.sum(jax.lax.stop_gradient(share_BE) * probs_BE, axis=-1),
        z_B=sum_of(jax.nn.logsumexp(logits_BTE, axis=-1) ** 2),
        entropy_B=sum_of(-jnp.sum(probs_BTE * log_BTE, axis=-1)),
        dropped_B=sum_of(dropped_BT),
        busiest_B=jnp.max(share_BE, axis=-1) * total_B,
        load_BE=load_BE,
    )


def _ranks(ids_Tk: jax.Array) -> jax.Array:
    """Number of choices before each one, in reading order, that are of its expert."""
    ids_A = ids_Tk.reshape(-1)
    order_A = jnp.argsort(ids_A, stable=True)
    sorted_A = ids_A[order_A]
    first_A = jnp.searchsorted(sorted_A, sorted_A, side="left").astype(jnp.int32)
    ranks_A = jnp.arange(ids_A.size, dtype=jnp.int32) - first_A
    return jnp.zeros_like(ids_A).at[order_A].set(ranks_A).reshape(ids_Tk.shape)


def _one_hot(ids_BTk: jax.Array, cfg: ModelConfig) -> jax.Array:
    return (ids_BTk[..., None] == jnp.arange(cfg.num_experts)).astype(jnp.float32)
