"""The layers of one stage of a pipeline: forward, back, weight gradients of a chunk.

What a forward pass keeps for the backward pass is what `train.remat` says of each
layer; or, to recompute stages, the chunk's input alone: then the backward pass runs the
layers once more, keeping of each what `train.remat` says.

A chunk is up to three groups of layers: the prefix, in the first chunk; some repeats of
the pattern, in all; the suffix, in the last. Layers of a group run one after another;
repeats are a loop, and one that a chunk lacks is passed over.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.ops.loss import LossConfig
from jaxinfra.ops.seam import Context
from jaxinfra.parallel.phases import Phases, cut
from jaxinfra.parallel.placement import Placement
from jaxinfra.params import Tree

GROUPS = ("prefix", "pattern", "suffix")


class Stack(NamedTuple):
    """The model that is pipelined. model: a `models.transformer.Model`, and loss: of
    its head, both by the rules `pipeline.inside`. remat: what a layer keeps for its
    backward pass. recompute: whether a forward pass keeps a chunk's input alone.
    unroll: the repeats of a chunk as a flat program.
    order_T: see Context, where it has no place here, since it is not traced.
    routers: of a model with experts, a `train.routers.Routers`. is_trained: bools, a
    tree like the parameters; None: all are."""

    model: Any
    cfg: ModelConfig
    loss: LossConfig
    remat: str = "none"
    recompute: bool = False
    unroll: bool = False
    order_T: Any = None
    routers: Any = None
    is_trained: Tree = None

    def layer(self, params, x_BTD, context: Context, layer: LayerConfig, number):
        """(y_BTD, what the layer told: `routers.Summed`, or () without routers)."""
        context = context._replace(order_T=self.order_T)
        y_BTD, told = self.model.block(params, x_BTD, context, layer, number, None)
        if told is None:
            return y_BTD, self.nothing()
        told = self.routers.of_layers(told, number)
        if context.told_scale is not None:
            scale = context.told_scale
            y_BTD = self.routers.with_gradient(y_BTD, told.loss, scale)
        return y_BTD, told

    def nothing(self) -> Tree:
        """What no layer tells."""
        return self.routers.nothing() if self.routers else ()


class ByLayer(NamedTuple):
    """What one pass leaves to another, by group and layer."""

    prefix: Tree
    pattern: Tree
    suffix: Tree


NOTHING_LEFT = ByLayer((), (), ())


class Chunks(NamedTuple):
    """What a stage does with its chunks; `virtual` says which, and may be traced.

    forward(virtual, x_BTD, context) -> (y_BTD, what its layers told, summed)
    keep(virtual, x_BTD, context) -> (y_BTD, the same, what is kept for `back`)
    back(virtual, kept, dy_BTD, context, grads) -> (dx_BTD, grads, ByLayer)
    weigh(virtual, left, context, grads) -> grads

    grads: a tree like those parameters that are trained, float32, to which is added.
    """

    forward: Callable[..., tuple[jax.Array, Tree]]
    keep: Callable[..., tuple[jax.Array, Tree, Tree]]
    back: Callable[..., tuple[jax.Array, Tree, ByLayer]]
    weigh: Callable[..., Tree]


def make_chunks(
    stack: Stack,
    params: Tree,
    placed: Placement,
    stage: jax.Array,
    *,
    x_BTD: jax.Array,
    context: Context,
    split: bool,
) -> Chunks:
    """The chunks of `stage`, inside the executor. params: {prefix, pattern, suffix},
    repeats by rows of `placed`. x_BTD and context are like those that will come; split:
    weight gradients are made apart, by `weigh`."""
    cfg = stack.cfg
    virtuals, stages = placed.count.shape
    count, first = jnp.asarray(placed.count), jnp.asarray(placed.first)
    number_of_suffix = len(cfg.prefix) + len(cfg.pattern) * cfg.repeats

    def group(name: str) -> _Group:
        one = _row(params[name], 0) if name == "pattern" else params[name]
        phases = functools.partial(_cut, stack, x_BTD, context, split=split)
        configs = getattr(cfg, name)
        masks = stack.is_trained and stack.is_trained[name]
        masks = masks or [None] * len(configs)
        return _Group(stack, configs, list(map(phases, configs, one, masks)), masks)

    prefix, pattern, suffix = map(group, GROUPS)

    def is_first(virtual):
        return (virtual == 0) & (stage == 0)

    def is_last(virtual):
        return (virtual == virtuals - 1) & (stage == stages - 1)

    def repeats(virtual):
        """For every repeat: its row, its first layer's number, whether it is there."""
        r = jnp.arange(placed.depth)
        number = len(cfg.prefix) + (first[virtual, stage] + r) * len(cfg.pattern)
        return virtual * placed.depth + r, number, r < count[virtual, stage]

    def there(flag):
        return True if placed.is_even else flag

    loop = functools.partial(jax.lax.scan, unroll=placed.depth if stack.unroll else 1)

    def through(virtual, x_BTD, context, *, keeps: bool):
        begun = (x_BTD, stack.nothing())
        args = (params["prefix"], begun, context, 0)
        begun, kept_first = prefix.through(is_first(virtual), *args, keeps=keeps)

        def turn(carry, at):
            row, number, flag = at
            args = (_row(params["pattern"], row), carry, context, number)
            return pattern.through(there(flag), *args, keeps=keeps)

        carry, kept = loop(turn, begun, repeats(virtual))
        args = (params["suffix"], carry, context, number_of_suffix)
        (y_BTD, told), kept_last = suffix.through(is_last(virtual), *args, keeps=keeps)
        return y_BTD, told, ByLayer(kept_first, kept, kept_last)

    def forward(virtual, x_BTD, context):
        return through(virtual, x_BTD, context, keeps=False)[:2]

    keep = functools.partial(through, keeps=True)

    def keep_input(virtual, x_BTD, context):
        return *forward(virtual, x_BTD, context), x_BTD

    def back_again(virtual, x_BTD, dy_BTD, context, grads):
        _, _, kept = keep(virtual, x_BTD, context)
        return back(virtual, kept, dy_BTD, context, grads)

    def back(virtual, kept: ByLayer, dy_BTD, context, grads):
        def turn_back(carry, at):
            (dy_BTD, sums), ((row, number, flag), kept) = carry, at
            mine = _row(params["pattern"], row)
            args = (mine, kept, dy_BTD, context, number)
            dy_BTD, made = pattern.back(there(flag), *args)
            if split:
                return (dy_BTD, sums), made
            return (dy_BTD, _add_row(sums, row, made)), None

        args = (params["suffix"], kept.suffix, dy_BTD, context, number_of_suffix)
        dy_BTD, made_last = suffix.back(is_last(virtual), *args)
        begun, at = (dy_BTD, grads["pattern"]), (repeats(virtual), kept.pattern)
        (dy_BTD, sums), made = loop(turn_back, begun, at, reverse=True)
        args = (params["prefix"], kept.prefix, dy_BTD, context, 0)
        dx_BTD, made_first = prefix.back(is_first(virtual), *args)
        if split:
            return dx_BTD, grads, ByLayer(made_first, made, made_last)
        grads = grads | {
            "prefix": _add(grads["prefix"], made_first),
            "pattern": sums,
            "suffix": _add(grads["suffix"], made_last),
        }
        return dx_BTD, grads, NOTHING_LEFT

    def weigh(virtual, left, context, grads):
        def turn(sums, at):
            (row, number, flag), left = at
            mine = _row(params["pattern"], row)
            made = pattern.weigh(there(flag), mine, left, context, number)
            return _add_row(sums, row, made), None

        at = (repeats(virtual), left.pattern)
        sums, _ = loop(turn, grads["pattern"], at)
        args = (params["prefix"], left.prefix, context, 0)
        made_first = prefix.weigh(is_first(virtual), *args)
        args = (params["suffix"], left.suffix, context, number_of_suffix)
        made_last = suffix.weigh(is_last(virtual), *args)
        return grads | {
            "prefix": _add(grads["prefix"], made_first),
            "pattern": sums,
            "suffix": _add(grads["suffix"], made_last),
        }

    if stack.recompute:
        return Chunks(forward, keep_input, back_again, weigh)
    return Chunks(forward, keep, back, weigh)


class _Group(NamedTuple):
    """Layers that follow each other. All methods take the number of the first; those
    with a flag do the work where it is true, else give x as it is and zeros."""

    stack: Stack
    configs: Sequence[LayerConfig]
    phases: Sequence[Phases]
    is_trained: Sequence[Tree]

    def parts(self, params, i, context, number):
        """Of layer i: what is trained, and what is not, as a part of the context."""
        trained, rest = apart(params[i], self.is_trained[i])
        return trained, (context, number + i, rest)

    def through(self, flag, params, carry, context, number, *, keeps: bool):
        """carry: (x_BTD, what layers told so far) -> (carry, what each keeps)."""

        def work(carry):
            (x_BTD, told), kept = carry, []
            for i, (layer, p) in enumerate(zip(self.configs, params, strict=True)):
                if keeps:
                    trained, about = self.parts(params, i, context, number)
                    x_BTD, more, values = self.phases[i].keep(trained, x_BTD, about)
                else:
                    x_BTD, more = self.stack.layer(p, x_BTD, context, layer, number + i)
                    values = []
                told = jax.tree.map(jnp.add, told, more)
                kept.append(values)
            return (x_BTD, told), kept

        return self._where(flag, work, carry)

    def back(self, flag, params, kept, dy_BTD, context, number):
        def work(dy_BTD):
            made = []
            for i in reversed(range(len(params))):
                trained, about = self.parts(params, i, context, number)
                dy_BTD, of_layer = self.phases[i].back(trained, about, kept[i], dy_BTD)
                made.insert(0, of_layer)
            return dy_BTD, made

        return self._where(flag, work, dy_BTD)

    def weigh(self, flag, params, left, context, number):
        def work(unused):
            made = []
            for i, phase in enumerate(self.phases):
                assert phase.weigh is not None
                trained, about = self.parts(params, i, context, number)
                made.append(phase.weigh(trained, about, left[i]))
            return unused, made

        return self._where(flag, work, jnp.float32(0))[1]

    def _where(self, flag, work, x):
        """`work(x)` -> (x, made); or (x as it is, zeros)."""
        if flag is True or not self.configs:
            return work(x)
        _, made = jax.eval_shape(work, x)
        return jax.lax.cond(flag, work, lambda x: (x, zeros_like(made)), x)


def zeros_like(tree: Tree, *leading: int) -> Tree:
    """Zeros of these shapes and shardings, with further dims in front."""

    def zeros(x):
        spec = jax.P(*[None] * len(leading), *x.sharding.spec)
        return jnp.zeros((*leading, *x.shape), x.dtype, out_sharding=spec)

    like = lambda x: jax.typeof(x) if isinstance(x, jax.Array) else x
    return jax.tree.map(lambda x: zeros(like(x)), tree)


def apart(params: Tree, is_trained: Tree) -> tuple[Tree, Tree]:
    """(what is trained, the rest): each has None where the other has an array."""
    if is_trained is None:
        return params, None
    part = lambda wanted: jax.tree.map(
        lambda x, flag: x if flag is wanted else None, params, is_trained
    )
    return part(True), part(False)


def joined(trained: Tree, rest: Tree) -> Tree:
    """The inverse of `apart`."""
    if rest is None:
        return trained
    is_none = lambda x: x is None
    either = lambda x, other: other if x is None else x
    return jax.tree.map(either, trained, rest, is_leaf=is_none)


def _cut(stack: Stack, x_BTD, context, layer, params, mask, *, split: bool) -> Phases:
    def block(trained, x_BTD, about):
        context, number, rest = about
        return stack.layer(joined(trained, rest), x_BTD, context, layer, number)

    trained, rest = apart(params, mask)
    about = (context, jnp.int32(0), rest)
    return cut(block, trained, x_BTD, about, remat=stack.remat, split=split)


def _row(tree: Tree, row) -> Tree:
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=row, keepdims=False)
    return jax.tree.map(take, tree)


def _add(sums: Tree, made: Tree) -> Tree:
    return jax.tree.map(lambda total, g: total + g.astype(total.dtype), sums, made)


def _add_row(sums: Tree, row, made: Tree) -> Tree:
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=row, axis=0)
    return jax.tree.map(put, sums, _add(_row(sums, row), made))
