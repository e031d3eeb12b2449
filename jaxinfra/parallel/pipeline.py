"""The executor of pipeline schedules: one SPMD program, a loop over a table's rows.

Inside one `shard_map`, manual over `pipeline` and over the axes that only split rows, a
`scan` walks the rows of `lowering.Program`. In a tick every stage, each under a `cond`
of its own, runs the forward pass, the backward pass and the weight gradient that its
row names; then what they made travels to the neighbours. In a balanced schedule what a
pass kept travels to the partner meanwhile. No collective over a manual axis is inside a
branch that stages take differently. Tensor, context and expert axes stay Explicit, so
that the model's own code runs in the branches as it is.

The embedding and the head belong to no stage: their vocabulary is split over all of
them (`sharding.Rules`), and all work together on the microbatch that enters the first
chunk, and on the one that leaves the last. So neither end is a bottleneck, and a tied
table is one table.

A forward pass leaves to the backward pass what `chunks` says, in a stash; a backward
pass walks the chunk's layers backwards, adding gradients into the carry. Parameters are
gathered over `fsdp` once a step, whatever `zero` is; gradients are summed over the axes
of rows once, at the end.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra import sharding
from jaxinfra.ops import loss
from jaxinfra.ops.seam import Context
from jaxinfra.parallel import hops, lowering, placement, schedules, travel
from jaxinfra.parallel.chunks import (
    GROUPS,
    NOTHING_LEFT,
    Stack,
    apart,
    joined,
    make_chunks,
    zeros_like,
)
from jaxinfra.params import Tree
from jaxinfra.quant import arrays
from jaxinfra.sharding import Layout, Rules

# (a device's part of a layer's array, its spec) -> it whole, or summed, over fsdp.
Meet = Callable[[jax.Array, jax.sharding.PartitionSpec], jax.Array]

# Axes whose devices the executor tells apart: `pipeline`, and those over which a step
# sums gradients once at its end. The others are left to the types of arrays.
ROW_AXES = ("data", "fsdp")
MANUAL = ("pipeline", *ROW_AXES)


class Microbatches(NamedTuple):
    """All microbatches of a step, [M, rows, ...]; see Context and objective.Targets."""

    tokens_MBT: jax.Array
    targets_MBT: jax.Array
    weights_MBT: jax.Array
    positions_MBT: jax.Array
    segments_MBT: jax.Array | None
    rows_MB: jax.Array


class Sums(NamedTuple):
    """Of the loss, and of what layers told: a `routers.Summed`, or ()."""

    loss: loss.CrossEntropy
    told: Tree


def inside(rules: Rules) -> Rules:
    """The rules of a model that runs in the executor, where a device has its own rows
    and layers, and parameters are whole over `fsdp`."""
    batch, rows = (
        tuple(axis for axis in axes if axis not in MANUAL)
        for axes in (rules.batch, rules.rows)
    )
    return dataclasses.replace(rules, batch=batch, rows=rows, embed=(), layers=())


def run(
    schedule: schedules.Schedule,
    stack: Stack,
    params: Tree,
    batch: Microbatches,
    *,
    layout: Layout,
    key: jax.Array | None,
    scale: jax.Array | float = 1.0,
    gather: Meet = sharding.all_gather,
    reduce: Meet | None = None,
    router_bias_LE: jax.Array | None = None,
) -> tuple[Tree | None, Sums]:
    """(gradients of `scale` x the loss sum, float32, laid out as `layout.grads` says,
    None where `stack.is_trained` is false; sums over all microbatches). No gradients
    where `schedule` has no backward pass. `params` are those of stack.model, as they
    are at rest. gather, reduce: of what layers have; None: in `policy.reduce`, as
    everything else. The loss has what layers told in it where there is a key.
    """
    cfg = stack.cfg
    placed = placement.place(
        cfg.repeats,
        stages=schedule.stages,
        virtual=schedule.virtual,
        size=len(cfg.pattern),
        prefix=len(cfg.prefix),
        suffix=len(cfg.suffix),
    )
    at_rest = lambda rules: jax.tree.map(
        lambda of: sharding.spec(rules, *of.axes), stack.model.specs
    )
    params_at_rest = at_rest(layout.params)
    grads_at_rest, _ = apart(at_rest(layout.grads), stack.is_trained)
    manual = functools.partial(sharding.among, axes=MANUAL)

    def body(params, batch, *traced):
        params = _each_device(sharding.all_gather, params, params_at_rest, gather)
        to_chunks = functools.partial(travel.to_chunks, placed=placed)
        params |= {"pattern": jax.tree.map(to_chunks, params["pattern"])}
        grads, sums = _walk(schedule, stack, placed, params, batch, *traced)
        sums = Sums(jax.lax.psum(sums.loss, ROW_AXES), jax.lax.psum(sums.told, MANUAL))
        if grads is None:
            return None, sums
        to_rest = functools.partial(travel.to_rest, placed=placed)
        grads |= {"pattern": jax.tree.map(to_rest, grads["pattern"])}
        for name in ("prefix", "suffix"):  # each is made on one stage
            grads |= {name: jax.lax.psum(grads[name], "pipeline")}

        grads = jax.tree.map(lambda g: g.astype(stack.loss.policy.reduce), grads)
        plain = functools.partial(sharding.all_reduce, axes=ROW_AXES)
        grads = _each_device(plain, grads, grads_at_rest, reduce or plain)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

    has_grads, rows = schedules.has_backward(schedule), jax.P(None, ROW_AXES)
    mapped = jax.shard_map(
        body,
        in_specs=(jax.tree.map(manual, params_at_rest), rows, *[jax.P()] * 3),
        out_specs=(jax.tree.map(manual, grads_at_rest) if has_grads else None, jax.P()),
        axis_names=set(MANUAL),
        check_vma=False,  # every sum over a manual axis is made here, by hand
    )
    return mapped(params, batch, key, jnp.float32(scale), router_bias_LE)


class _Carry(NamedTuple):
    """What goes from tick to tick. x, dy: what comes from the neighbours. Stashes: as
    `lowering.Program` has them."""

    x_BTD: jax.Array
    dy_BTD: jax.Array
    x_stash: jax.Array
    kept_stash: Tree
    dy_stash: jax.Array
    left_stash: Tree
    grads: Tree
    sums: Sums


def _walk(schedule, stack: Stack, placed, params, batch, key, scale, router_bias_LE):
    """One device's way through the table: (gradients by its own rows and chunks, sums
    of the loss over its own rows)."""
    model, last = stack.model, schedule.stages - 1
    table, slots = lowering.lower(schedule)
    has_grads, is_split = schedules.has_backward(schedule), schedule.weight is not None
    stage = jax.lax.axis_index("pipeline")
    of_ends = lambda tree: {name: tree[name] for name in params if name not in GROUPS}
    ends = of_ends(params)
    trained_ends, rest = apart(ends, stack.is_trained and of_ends(stack.is_trained))

    def of(microbatch) -> tuple[Microbatches, Context]:
        one = jax.tree.map(lambda x: _take(x, microbatch), batch)
        context = Context(
            one.positions_MBT,
            one.segments_MBT,
            one.rows_MB,
            key,
            weights_BT=one.weights_MBT if stack.routers else None,
            router_bias_LE=router_bias_LE,
            told_scale=scale if stack.routers and key is not None else None,
        )
        return one, model.prepare(context)

    def enter(microbatch, ends):
        one, context = of(microbatch)
        return model.embed(ends, one.tokens_MBT, context)

    no_x_BTD = zeros_like(jax.eval_shape(enter, jnp.int32(0), ends))
    chunks = make_chunks(
        stack, params, placed, stage, x_BTD=no_x_BTD, context=of(0)[1], split=is_split
    )

    whole = sharding.spec(stack.loss.rules, "batch", "length", "width")

    def leave(microbatch, y_BTD, grads):
        """The loss of what the last chunk made, by all stages together."""
        one, _ = of(microbatch)
        y_BTD = hops.to_all(y_BTD, stage == last)

        def unembed(trained, y_BTD):
            h_BTD, head_VD = model.unembed(joined(trained, rest), y_BTD)
            return jax.reshard(h_BTD, whole), head_VD

        (h_BTD, head_VD), pull = jax.vjp(unembed, trained_ends, y_BTD)
        tokens = (one.targets_MBT, one.weights_MBT, stack.loss)
        if not has_grads:
            return loss.cross_entropy(h_BTD, head_VD, *tokens), y_BTD, grads
        sums, of_sum = loss.with_gradients(h_BTD, head_VD, *tokens, scale)
        dends, dy_BTD = pull(of_sum)
        return sums, dy_BTD, _add(grads, dends)

    def go_back(microbatch, dx_BTD, grads):
        """The gradient of the embedding, by all stages together."""
        dx_BTD = hops.to_all(dx_BTD, stage == 0)
        embed = lambda trained: enter(microbatch, joined(trained, rest))
        _, pull = jax.vjp(embed, trained_ends)
        return _add(grads, pull(dx_BTD)[0])

    def forward(microbatch, virtual, x_BTD):
        context = of(microbatch)[1]
        if has_grads:
            return chunks.keep(virtual, x_BTD, context)
        return *chunks.forward(virtual, x_BTD, context), ()

    def back(microbatch, virtual, kept, dy_BTD, grads):
        return chunks.back(virtual, kept, dy_BTD, of(microbatch)[1], grads)

    def weigh(microbatch, virtual, left, grads):
        return chunks.weigh(virtual, left, of(microbatch)[1], grads)

    no_sums = loss.CrossEntropy(jnp.float32(0), jnp.float32(0))
    no_told = stack.nothing()
    at_first = jnp.int32(0), jnp.int32(0)
    no_kept = zeros_like(jax.eval_shape(forward, *at_first, no_x_BTD)[2])

    def tick(carry: _Carry, row: lowering.Program):
        grads = carry.grads
        mine = jax.tree.map(lambda x: x[stage] if x.ndim else x, row)
        is_entering, is_leaving = row.enter >= 0, row.leave >= 0
        kept_stash, lent = carry.kept_stash, ()
        if schedule.is_balanced:
            with jax.named_scope("lend"):
                lent = _take(kept_stash, mine.kept_out)
                # Read before anything is put there: else the stash would be copied.
                lent, kept_stash = jax.lax.optimization_barrier((lent, kept_stash))
                lent = hops.to_partner(lent, schedule.stages)
        with jax.named_scope("enter"):
            x_BTD = jax.lax.cond(
                is_entering, lambda: enter(row.enter, ends), lambda: no_x_BTD
            )
        x_BTD = jnp.where(is_entering & (stage == 0), x_BTD, carry.x_BTD)
        x_stash = _put(carry.x_stash, x_BTD, mine.x_in)
        with jax.named_scope("forward"):
            # Read outside the branch: inside, the stash would be copied into it.
            x_BTD = jax.lax.optimization_barrier(_take(x_stash, mine.forward_x))
            y_BTD, told, kept = jax.lax.cond(
                mine.forward_microbatch >= 0,
                lambda x: forward(mine.forward_microbatch, mine.forward_virtual, x),
                lambda x: (no_x_BTD, no_told, no_kept),
                x_BTD,
            )
        kept_stash = _put(kept_stash, kept, mine.forward_kept)
        with jax.named_scope("leave"):
            sums, dy_BTD, grads = jax.lax.cond(
                is_leaving,
                lambda y, grads: leave(row.leave, y, grads),
                lambda y, grads: (no_sums, no_x_BTD, grads),
                y_BTD,
                grads,
            )
        new = carry._replace(
            x_BTD=hops.to_next(y_BTD, schedule.stages),
            x_stash=x_stash,
            sums=jax.tree.map(jnp.add, carry.sums, Sums(sums, told)),
        )
        if not has_grads:
            return new, None
        dy_BTD = jnp.where(is_leaving & (stage == last), dy_BTD, carry.dy_BTD)
        dy_stash = _put(carry.dy_stash, dy_BTD, mine.dy_in)
        with jax.named_scope("backward"):
            kept = _take(kept_stash, mine.backward_kept)
            dy_BTD = _take(dy_stash, mine.backward_dy)
            kept, dy_BTD = jax.lax.optimization_barrier((kept, dy_BTD))
            dx_BTD, grads, left = jax.lax.cond(
                mine.backward_microbatch >= 0,
                lambda *args: back(
                    mine.backward_microbatch, mine.backward_virtual, *args
                ),
                lambda kept, dy, grads: (no_x_BTD, grads, no_left),
                kept,
                dy_BTD,
                grads,
            )
        if schedule.is_balanced:
            # After both branches, so that it can travel while they run.
            lent, dx_BTD = jax.lax.optimization_barrier((lent, dx_BTD))
            kept_stash = _put(kept_stash, lent, mine.kept_in)
        left_stash = _put(carry.left_stash, left, mine.backward_left)
        if is_split:
            with jax.named_scope("weight"):
                left = jax.lax.optimization_barrier(_take(left_stash, mine.weight_left))
                grads = jax.lax.cond(
                    mine.weight_microbatch >= 0,
                    lambda *args: weigh(
                        mine.weight_microbatch, mine.weight_virtual, *args
                    ),
                    lambda left, grads: grads,
                    left,
                    grads,
                )
        with jax.named_scope("enter"):
            grads = jax.lax.cond(
                row.back >= 0,
                lambda dx, grads: go_back(row.back, dx, grads),
                lambda dx, grads: grads,
                dx_BTD,
                grads,
            )
        new = new._replace(
            dy_BTD=hops.to_next(dx_BTD, schedule.stages, by=-1),
            kept_stash=kept_stash,
            dy_stash=dy_stash,
            left_stash=left_stash,
            grads=grads,
        )
        return new, None

    no_grads, no_left = None, NOTHING_LEFT
    if has_grads:
        no_grads = jax.tree.map(
            lambda w: zeros_like(w).astype(stack.loss.policy.accumulate),
            apart(params, stack.is_trained)[0],
        )
        if is_split:
            args = (*at_first, no_kept, no_x_BTD, no_grads)
            no_left = zeros_like(jax.eval_shape(back, *args)[2])
    carry = _Carry(
        x_BTD=no_x_BTD,
        dy_BTD=no_x_BTD,
        x_stash=zeros_like(no_x_BTD, slots.x),
        kept_stash=zeros_like(no_kept, slots.kept),
        dy_stash=zeros_like(no_x_BTD, slots.dy),
        left_stash=zeros_like(no_left, slots.left),
        grads=no_grads,
        sums=Sums(no_sums, no_told),
    )
    carry, _ = jax.lax.scan(tick, carry, jax.tree.map(jnp.asarray, table))
    return carry.grads, carry.sums


def _each_device(function: Meet, tree: Tree, specs: Tree, of_layers: Meet) -> Tree:
    """function(part, spec) of every leaf, `of_layers` in the groups of layers, where a
    device's part is a plain array: jax 0.10 does not lower psum_scatter of one that is
    split over Explicit axes. What is kept in few bits goes by `function`, as it is."""
    explicit = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)

    def meet(name: str, part: Any, spec: Any) -> Any:
        if arrays.is_quantized(part):
            return jax.tree.map(function, part, spec)
        return (of_layers if name in GROUPS else function)(part, spec)

    def body(tree: Tree) -> Tree:
        return {
            name: jax.tree.map(
                functools.partial(meet, name),
                tree[name],
                specs[name],
                is_leaf=arrays.is_quantized,
            )
            for name in tree
        }

    return jax.shard_map(
        body, in_specs=(explicit,), out_specs=explicit, check_vma=False
    )(tree)


def _add(grads: Tree, dends: Tree) -> Tree:
    """`grads` with those of the embedding, the head and what else is of no layer."""
    return grads | {
        name: jax.tree.map(jnp.add, grads[name], d) for name, d in dends.items()
    }


def _take(tree: Tree, slot) -> Tree:
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=slot, keepdims=False)
    return jax.tree.map(take, tree)


def _put(tree: Tree, values: Tree, slot) -> Tree:
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=slot, axis=0)
    return jax.tree.map(put, tree, values)
