"""Tokens go to the devices that hold their experts, and come back.

`make_dispatch` makes the seam's `Dispatch`: choose experts, meet them by one of three
ways that give the same numbers, add the experts that every token meets.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxinfra import mesh, sharding
from jaxinfra.config import CommConfig, ModelConfig
from jaxinfra.ops import attention, experts, grouped, layers, seam
from jaxinfra.ops.experts import Choice
from jaxinfra.ops.seam import Dispatch, Einsum
from jaxinfra.ops.varying import varying_like
from jaxinfra.precision import Policy
from jaxinfra.quant import communication
from jaxinfra.sharding import Rules

Way = Literal["dropless", "dense"]


def make_dispatch(
    cfg: ModelConfig,
    *,
    policy: Policy,
    rules: Rules,
    way: Way = "dropless",
    comm: CommConfig | None = None,
) -> Dispatch:
    """A layer of experts. In training a `capacity_factor` takes the place of
    "dropless"; without targets, in scoring and generation, none is dropped. comm: in
    how many bits "dropless" has weights cross the fsdp axis, as the einsum does.

    Limits: "dropless" multiplies experts in compute dtype whatever einsum it is given,
    and goes the way of "dense" for weights that are `seam.Wrapped`.
    """
    full = dataclasses.replace(policy, compute=jnp.dtype("float32"))
    router = seam.make_einsum(full, rules)
    traffic = communication.of_experts(comm) if comm else grouped.PLAIN

    def dispatch(params, x_BTD, context, number, *, einsum):
        whole = sharding.spec(rules, "batch", "length", "width")
        between = sharding.spec(rules, "batch", "residual", "width")
        x_BTD = jax.reshard(x_BTD, whole)
        bias_LE = context.router_bias_LE
        bias_E = None if bias_LE is None else bias_LE[number]
        choice, told = experts.choose(
            params, x_BTD, context, bias_E, cfg=cfg, einsum=router, rules=rules
        )
        # A grouped matmul takes arrays; what is adapted, or in few bits, is none.
        weights = [params[name] for name in ("up", "gate", "down") if name in params]
        is_plain = all(isinstance(w, jax.Array) for w in weights)
        if way != "dense" and not is_plain:
            attention.say_once(
                "experts: weights that are adapted or in few bits meet every token, as"
                " with parallel.experts='dense'; grouped matmuls take plain arrays"
            )
        if way == "dense" or not is_plain:
            y_BTD = experts.dense(params, x_BTD, choice, cfg=cfg, einsum=einsum)
        elif choice.ranks_BTk is not None:
            y_BTD = bounded(params, x_BTD, choice, cfg=cfg, einsum=einsum, rules=rules)
        else:
            how = {"policy": policy, "rules": rules, "traffic": traffic}
            y_BTD = dropless(params, x_BTD, choice, cfg=cfg, **how)
        if "down_bias" in params:
            gates_BTE = experts.gates_of_all(choice, cfg).astype(y_BTD.dtype)
            bias_ED = experts.on_all(params["down_bias"]).astype(y_BTD.dtype)
            y_BTD += jnp.einsum("BTE,ED->BTD", gates_BTE, bias_ED)
        y_BTD = jax.reshard(y_BTD, between)
        if "shared" in params:
            y_BTD += layers.mlp(
                params["shared"], x_BTD, activation=cfg.activation, einsum=einsum
            )
        return checkpoint_name(y_BTD, "ffn_out"), told

    return dispatch


def dropless(
    params: dict,
    x_BTD: jax.Array,
    choice: Choice,
    *,
    cfg: ModelConfig,
    policy: Policy,
    rules: Rules,
    traffic: grouped.Traffic = grouped.PLAIN,
) -> jax.Array:
    """Every token to each of its experts, by grouped matmuls: [B, T, D].

    Limits: with P devices along `expert` a device has room for P times its own tokens
    times min(k, E / P), which is what it gets if all choose its experts.
    """
    tokens = sharding.spec(rules, "batch", "length", None)
    names = [n for n in ("up", "gate", "up_bias", "gate_bias", "down") if n in params]
    weights = {name: _as_tokens_are_split(params[name], tokens) for name in names}
    specs = {name: jax.typeof(w).sharding.spec for name, w in weights.items()}

    def local(weights, x_BTD, ids_BTk, gates_BTk):
        B, T, D = x_BTD.shape
        k, E_here = cfg.experts_per_token, weights["up"].shape[0]
        # Split over tensor, an expert's result is a part of a sum, taken at the end.
        x_ND = jax.lax.pcast(x_BTD.reshape(B * T, D), "tensor", to="varying")
        ids_A = ids_BTk.reshape(-1)
        if E_here == cfg.num_experts:
            y_AD = meet(x_ND, ids_A, k, weights)
        else:
            y_AD = _exchanged(x_ND, ids_A, weights, meet, k=k, E_here=E_here)
        y_NkD = y_AD.reshape(B * T, k, D)
        gates_Nk = gates_BTk.reshape(B * T, k).astype(y_AD.dtype)
        y_ND = jnp.einsum(
            "NkD,Nk->ND",
            y_NkD,
            gates_Nk,
            precision=policy.matmul_precision,
            preferred_element_type=jnp.float32,
        )
        return jax.lax.psum(y_ND.astype(policy.compute), "tensor").reshape(B, T, D)

    def meet(x_ND, ids_A, copies, weights):
        """The result of every copy of every row, with an expert of this device."""
        E, A = weights["up"].shape[0], ids_A.size
        align = grouped.alignment(A, E)
        rows = A if align == 1 else (-(-A // align) + E) * align
        places = grouped.arrange(ids_A, num_experts=E, rows=rows, align=align)
        x_RD = grouped.moved(x_ND, places.source_R, places.place_A, copies)
        of = grouped.expert_of_rows(places.sizes_E, rows)

        def project(name, x_RI=x_RD):
            at = (places.sizes_E, specs[name], align)
            y_RO = grouped.grouped(x_RI, weights[name], *at, policy, traffic)
            if f"{name}_bias" in weights:
                y_RO += weights[f"{name}_bias"].astype(y_RO.dtype)[of]
            return checkpoint_name(y_RO, "ffn_in") if name != "down" else y_RO

        y_RD = project("down", layers.activate(cfg.activation, project))
        return grouped.moved(y_RD, places.place_A, places.source_R)

    mapped = jax.shard_map(
        local, in_specs=(specs, tokens, tokens, tokens), out_specs=tokens
    )
    return mapped(weights, x_BTD, choice.ids_BTk, choice.gates_BTk)


def bounded(
    params: dict,
    x_BTD: jax.Array,
    choice: Choice,
    *,
    cfg: ModelConfig,
    einsum: Einsum,
    rules: Rules,
) -> jax.Array:
    """Tokens that find room, in buffers of one size for every expert and row.

    The weights are met through the seam's einsum. Devices along `context` each take a
    part of every buffer, so they gather the row's tokens and sum its results.
    """
    T, E, k = x_BTD.shape[1], cfg.num_experts, cfg.experts_per_token
    parts = jax.sharding.get_abstract_mesh().shape["context"]
    C = -(-experts.capacity(cfg, T) // parts)  # of one device
    tokens = sharding.spec(rules, "batch", "length", None)
    buffers = sharding.spec(rules, "rows", "experts", "length", None)
    out = ("rows", "experts", "length")

    def places(ids_BTk, ranks_BTk):
        """Where every choice stands in the buffers here, and what every place takes."""
        rows_B11 = jnp.arange(ids_BTk.shape[0], dtype=jnp.int32)[:, None, None]
        own_BTk = ranks_BTk - jax.lax.axis_index("context") * C
        is_here_BTk = (own_BTk >= 0) & (own_BTk < C)
        is_here_BTk &= ranks_BTk < experts.capacity(cfg, T)
        rows = ids_BTk.shape[0] * E * C
        place_A = jnp.where(is_here_BTk, (rows_B11 * E + ids_BTk) * C + own_BTk, rows)
        place_A = place_A.reshape(-1)
        source_R = jnp.full(rows, place_A.size, jnp.int32)
        source_R = varying_like(source_R, place_A)
        numbers_A = jnp.arange(place_A.size, dtype=jnp.int32)
        return place_A, source_R.at[place_A].set(numbers_A, mode="drop")

    def whole(x_BTX):
        return jax.lax.all_gather(x_BTX, "context", axis=1, tiled=True)

    def send(x_BTD, ids_BTk, ranks_BTk):
        x_BTD, ids_BTk, ranks_BTk = map(whole, (x_BTD, ids_BTk, ranks_BTk))
        place_A, source_R = places(ids_BTk, ranks_BTk)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        x_RD = grouped.moved(x_ND, source_R, place_A, k)
        x_BECD = x_RD.reshape(-1, E, C, x_BTD.shape[-1])
        return jax.lax.all_to_all(x_BECD, "expert", 1, 0, tiled=True)

    def receive(y_BECD, ids_BTk, ranks_BTk, gates_BTk):
        y_BECD = jax.lax.all_to_all(y_BECD, "expert", 0, 1, tiled=True)
        ids_BTk, ranks_BTk, gates_BTk = map(whole, (ids_BTk, ranks_BTk, gates_BTk))
        place_A, source_R = places(ids_BTk, ranks_BTk)
        y_RD = y_BECD.reshape(-1, y_BECD.shape[-1])
        y_AD = grouped.moved(y_RD, place_A, source_R)
        y_BTkD = y_AD.reshape(*ids_BTk.shape, -1)
        gates_BTk = gates_BTk.astype(y_RD.dtype)
        y_BTD = jnp.einsum(
            "BTkD,BTk->BTD", y_BTkD, gates_BTk, preferred_element_type=jnp.float32
        ).astype(y_RD.dtype)
        return jax.lax.psum_scatter(y_BTD, "context", scatter_dimension=1, tiled=True)

    chosen = (choice.ids_BTk, choice.ranks_BTk)
    x_BECD = jax.shard_map(send, in_specs=(tokens,) * 3, out_specs=buffers)(
        x_BTD, *chosen
    )

    def project(name):
        y_BECF = einsum("BECD,EDF->BECF", x_BECD, params[name], out=(*out, "ffn"))
        if f"{name}_bias" in params:
            y_BECF += params[f"{name}_bias"].astype(y_BECF.dtype)[None, :, None]
        return checkpoint_name(y_BECF, "ffn_in")

    act_BECF = layers.activate(cfg.activation, project)
    y_BECD = einsum("BECF,EFD->BECD", act_BECF, params["down"], out=(*out, "width"))
    back = jax.shard_map(receive, in_specs=(buffers, *(tokens,) * 3), out_specs=tokens)
    return back(y_BECD, *chosen, choice.gates_BTk)


def _as_tokens_are_split(w: jax.Array, tokens: jax.sharding.PartitionSpec) -> jax.Array:
    """`w` whole over those of ZeRO's axes along which all have the same tokens, as in
    scoring along `context`."""
    spec = jax.typeof(w).sharding.spec
    split = {axis for entry in tokens for axis in sharding.axes_of(entry)}
    idle = tuple(axis for axis in sharding.zero_axes(*spec) if axis not in split)
    return jax.reshard(w, sharding.gathered(spec, *idle)) if idle else w


class _Route(NamedTuple):
    """Of a ragged exchange, for every other device: rows from `sends_from` on, so many,
    go to its rows from `arrive_at` on; so many come from it."""

    sends_from_P: jax.Array
    sends_P: jax.Array
    arrive_at_P: jax.Array
    receives_P: jax.Array


def _exchanged(
    x_ND: jax.Array,
    ids_A: jax.Array,
    weights: dict,
    meet: Callable,
    *,
    k: int,
    E_here: int,
) -> jax.Array:
    """`meet` on the devices of `expert` that have the rows' experts: [A, D]."""
    P = jax.lax.axis_size("expert")
    N, A = x_ND.shape[0], ids_A.size
    here = jax.lax.axis_index("expert")
    by_expert = grouped.arrange(ids_A, num_experts=P * E_here, rows=A, align=1)
    # Rows from each device to each expert, known to all: every offset follows from it.
    counts_PE = jax.lax.all_gather(by_expert.sizes_E, "expert")
    sends_PQ = counts_PE.reshape(P, P, E_here).sum(-1)
    before_PQ = jnp.cumsum(sends_PQ, axis=1) - sends_PQ  # in the buffer of the sender
    after_PQ = jnp.cumsum(sends_PQ, axis=0) - sends_PQ  # in that of the receiver
    there = _Route(before_PQ[here], sends_PQ[here], after_PQ[here], sends_PQ[:, here])
    back = _Route(
        after_PQ[:, here], sends_PQ[:, here], before_PQ[:, here], sends_PQ[here]
    )
    R = P * N * min(k, E_here)
    x_AD = grouped.moved(x_ND, by_expert.source_R, by_expert.place_A, k)
    x_RD = _exchange(x_AD, there, back, R)
    # What came stands by sender, then by expert.
    mine_PE = jax.lax.dynamic_slice_in_dim(counts_PE, here * E_here, E_here, axis=1)
    came_R = jnp.arange(R, dtype=jnp.int32)
    ids_R = grouped.expert_of_rows(mine_PE.reshape(-1), R) % E_here
    ids_R = jnp.where(came_R < jnp.sum(mine_PE), ids_R, E_here)
    y_AD = _exchange(meet(x_RD, ids_R, 1, weights), back, there, A)
    return grouped.moved(y_AD, by_expert.place_A, by_expert.source_R)


def _exchange(x_AD: jax.Array, there: _Route, back: _Route, rows: int) -> jax.Array:
    """Rows of `x_AD` on other devices' [rows, D]; where nothing came stands anything
    (Mixtral on 16 v5p: to write zeros there first was 0.7 s of 3.1). The gradient takes
    the way back."""
    size = x_AD.shape[0]

    @jax.custom_vjp
    def exchange(x_AD, there, back):
        return _ragged_all_to_all(x_AD, there, rows)

    def forward(x_AD, there, back):
        return exchange(x_AD, there, back), back

    def backward(back, g_RD):
        return _ragged_all_to_all(g_RD, back, size), None, None

    exchange.defvjp(forward, backward)
    return exchange(x_AD, there, back)


def _ragged_all_to_all(x_AD: jax.Array, route: _Route, rows: int) -> jax.Array:
    if mesh.platform() != "cpu":
        room_RD = jax.lax.empty((rows, x_AD.shape[1]), x_AD.dtype)
        room_RD = varying_like(room_RD, x_AD)
        return jax.lax.ragged_all_to_all(x_AD, room_RD, *route, axis_name="expert")
    # XLA's CPU backend has none: all rows come, and those that were sent are taken; nan
    # elsewhere, so that every test would see it read.
    here = jax.lax.axis_index("expert")
    x_PAD = jax.lax.all_gather(x_AD, "expert")
    sent = jax.lax.all_gather(route, "expert")
    start_P, size_P = sent.arrive_at_P[:, here], sent.sends_P[:, here]
    row_R1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
    is_from_RP = (row_R1 >= start_P) & (row_R1 < start_P + size_P)
    at_RP = sent.sends_from_P[:, here] + row_R1 - start_P
    device_R = jnp.argmax(is_from_RP, axis=1)
    at_R = jnp.sum(jnp.where(is_from_RP, at_RP, 0), axis=1)
    x_RD = x_PAD[device_R, at_R]
    return jnp.where(jnp.any(is_from_RP, axis=1)[:, None], x_RD, jnp.nan)
