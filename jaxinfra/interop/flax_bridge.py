"""A user's own flax module on our step: `from_linen`, `from_nnx` give (init, LossFn).

The module runs inside `jax.sharding.auto_axes`, where the compiler places it by where
parameters and batch are; flax layers raise on arrays whose type carries a sharding.
`shardings_for` places parameters that have no specs. Limits: not pipelined, and a
module computes in its own dtypes, not a `Policy`'s.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxinfra.params import ParamSpec, Tree
from jaxinfra.sharding import Layout
from jaxinfra.train import state
from jaxinfra.train.objective import Aux, LossFn
from jaxinfra.train.state import Shardings


class ModuleLoss(Protocol):
    def __call__(
        self, model: Any, batch: Any, is_training: bool
    ) -> tuple[jax.Array, jax.Array]:
        """(losses, weights), of one shape: [B], or [B, T] for tokens.

        `model` is the user's module, ready to be called; `batch` any tree of arrays
        whose first dim is rows, as many as there are. Each row's loss is its own.
        """
        ...


class Bridged(NamedTuple):
    """init(key, example_batch) -> (params, model_state), plain trees of arrays, each
    whole on every device; model_state holds what is neither trained nor changed."""

    init: Callable[[jax.Array, Any], tuple[Tree, Tree]]
    loss_fn: LossFn


def from_linen(
    module: nn.Module,
    loss: ModuleLoss,
    *,
    rows: Callable[[Any], jax.Array] | None = None,
) -> Bridged:
    """A linen module as (init, LossFn).

    rows: gives each row's global id [B], and turns randomness on: each row passes alone
    (as a batch of one) with a key of its own, so that its dropout mask is the same on
    every mesh and for any number of microbatches. Without it the module must not draw.
    Errors: ValueError for a module with batch statistics, or that draws without `rows`.
    """

    def split(variables: Tree) -> tuple[Tree, Tree]:
        collections = dict(nn.meta.unbox(variables))
        if "batch_stats" in collections:
            raise ValueError(_BATCH_STATS.format(what="collection 'batch_stats'"))
        return collections.pop("params", {}), collections

    def init(key, batch):
        variables = nn.init(lambda model, b: loss(model, b, False), module)
        make = lambda key, batch: split(variables(key, batch))
        return jax.sharding.auto_axes(make, out_sharding=jax.P())(key, batch)

    def losses(params, model_state, batch, key, is_training):
        split(model_state)
        apply = nn.apply(lambda model, b: loss(model, b, is_training), module)
        try:
            return apply({"params": params, **model_state}, batch, rngs=key)
        except flax.errors.InvalidRngError as error:
            raise ValueError(_NO_ROWS) from error

    return Bridged(init, _loss_fn(losses, rows))


def from_nnx(
    module_or_factory: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    loss: ModuleLoss,
    *,
    rows: Callable[[Any], jax.Array] | None = None,
) -> Bridged:
    """An nnx module, or a factory `Rngs -> module`, as (init, LossFn).

    `nnx.Param`s are trained. A module already built starts from its own parameters, and
    `init` ignores its key. In training `module.train()` is in force, else
    `module.eval()`. rows: as in `from_linen`. Errors: ValueError for a module with
    `nnx.BatchStat`, that changes a variable, or that has random streams and no `rows`.
    """
    kinds = (nnx.Param, nnx.RngState, ...)
    if isinstance(module_or_factory, nnx.Module):
        build = lambda key: module_or_factory
        abstract = module_or_factory
    else:
        build = lambda key: module_or_factory(nnx.Rngs(key))
        abstract = nnx.eval_shape(lambda: build(0))
    if nnx.to_pure_dict(nnx.state(abstract, nnx.BatchStat)):
        raise ValueError(_BATCH_STATS.format(what="nnx.BatchStat"))
    graph, *states = nnx.split(abstract, *kinds)

    def init(key, batch):
        del batch

        def make(key):
            _, params, _, others = nnx.split(build(key), *kinds)
            return nnx.to_pure_dict(params), nnx.to_pure_dict(others)

        return jax.sharding.auto_axes(make, out_sharding=jax.P())(key)

    def losses(params, model_state, batch, key, is_training):
        if is_training and key is None and jax.tree.leaves(states[1]):
            raise ValueError(_NO_ROWS)
        streams = _streams(states[1], jax.random.key(0) if key is None else key)
        pure = (params, streams, model_state)
        filled = [jax.tree.map(lambda leaf: leaf, s) for s in states]  # copies
        for of_kind, values in zip(filled, pure, strict=True):
            nnx.replace_by_pure_dict(of_kind, values)
        model = nnx.merge(graph, *filled)
        model.train() if is_training else model.eval()
        before = _variables(model)
        result = loss(model, batch, is_training)
        after = _variables(model)
        if changed := [path for path in before if before[path] is not after.get(path)]:
            raise ValueError(_CHANGED.format(path="/".join(map(str, changed[0]))))
        return result

    return Bridged(init, _loss_fn(losses, rows))


def specs_for(params: Tree, layout: Layout) -> Tree:
    """Specs for parameters that have none: the largest dim that divides over `fsdp` is
    `embed`, the dim that ZeRO shards; arrays without one are replicated."""
    parts = layout.mesh.shape["fsdp"]

    def spec(leaf) -> ParamSpec:
        fits = [
            dim for dim, size in enumerate(leaf.shape) if size and size % parts == 0
        ]
        split = max(fits, key=lambda dim: leaf.shape[dim], default=None)
        axes = tuple("embed" if dim == split else None for dim in range(leaf.ndim))
        return ParamSpec(tuple(leaf.shape), axes, (), "matrix", _no_initializer)

    return jax.tree.map(spec, params)


def shardings_for(
    params: Tree, tx: optax.GradientTransformation, layout: Layout
) -> Shardings:
    """Where parameters without specs, their gradients and the state of `tx` live.

    `tx` must take the keyword `step`: wrap a plain one in
    `optax.with_extra_args_support`.
    """
    return state.make_shardings(specs_for(params, layout), tx, layout)


_BATCH_STATS = (
    "the module has {what}: a running mean depends on which rows shared a batch and in "
    "which order batches came; state here may only be made from sums that microbatches "
    "and devices merge in any order; use LayerNorm, RMSNorm or GroupNorm instead"
)
_NO_ROWS = (
    "the module draws random numbers while training; every draw must belong to a row "
    "of the global batch; pass rows=..., which gives each row's id (as "
    "train.objective.numbered makes them), or set its dropout to 0"
)
_CHANGED = (
    "the module changes its variable {path} in a call; only parameters change in "
    "training, by the optimizer; return the value through the loss, or drop it"
)


def _loss_fn(losses: Callable, rows: Callable[[Any], jax.Array] | None) -> LossFn:
    """The LossFn of `losses(params, model_state, batch, key, is_training)`."""

    def sums(params, model_state, batch, key):
        if key is None or rows is None:
            values, weights = losses(params, model_state, batch, None, key is not None)
        else:

            def one(row, number):
                own_key = jax.random.fold_in(key, number)
                batch = jax.tree.map(lambda x: x[None], row)
                return losses(params, model_state, batch, own_key, True)

            values, weights = jax.vmap(one)(batch, rows(batch))
        if values.shape != weights.shape:
            raise ValueError(
                f"the loss gave losses of shape {values.shape} and weights of shape "
                f"{weights.shape}; they must be of one shape, a weight for each loss"
            )
        weights = weights.astype(jnp.float32)
        return jnp.sum(values.astype(jnp.float32) * weights), jnp.sum(weights)

    def loss_fn(params, model_state, batch, key):
        automatic = jax.sharding.auto_axes(sums, out_sharding=jax.P())
        loss_sum, weight_sum = automatic(params, model_state, batch, key)
        return loss_sum, Aux(weight_sum, {})

    return loss_fn


def _streams(state: nnx.State, key: jax.Array) -> Tree:
    """The values of random streams: each has its own key, and has drawn nothing."""

    def value(path, variable):
        shape = variable.get_value().shape
        if not isinstance(variable, nnx.RngKey):
            return jnp.zeros(shape, jnp.uint32)
        name = "/".join(map(str, path))
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.split(own_key, shape) if shape else own_key

    flat = {path: value(path, v) for path, v in nnx.to_flat_state(state)}
    return nnx.traversals.unflatten_mapping(flat)


def _variables(model: nnx.Module) -> dict[tuple, Any]:
    """Path -> value of every variable but random streams."""
    _, _, kept = nnx.split(model, nnx.RngState, ...)
    return {path: v.get_value() for path, v in nnx.to_flat_state(kept)}


def _no_initializer(key, shape, dtype):
    raise ValueError("these parameters come from a flax module: use Bridged.init")
