"""A user's own flax module on our step: `from_linen`, `from_nnx` give `Bridged`, and
`make_task` a `Task` of it, for `experiment.train` and config files.

The module runs inside `jax.sharding.auto_axes`, where the compiler places it by where
parameters and batch are; flax layers raise on arrays whose type carries a sharding.
`shardings_for` places parameters that have no specs.

Statistics of batches: `interop.running_norm` keeps all promises. flax's own BatchNorm
needs `batch_stats="per_microbatch"`: it then normalises each microbatch by its own mean
and variance over all devices, so a mesh does not change a result, but the number of
microbatches does; the running values move once a step, by the mean of what the
microbatches make of them, and not at all in a step that is not finite.

Limits: not pipelined, and a module computes in its own dtypes, not a `Policy`'s.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxinfra import sharding
from jaxinfra.interop import running_norm
from jaxinfra.params import ParamSpec, Tree, named, unflatten
from jaxinfra.sharding import Layout
from jaxinfra.tasks import Stream, Task
from jaxinfra.train import evaluate, state
from jaxinfra.train.objective import Aux, LossFn
from jaxinfra.train.state import Shardings

BatchStats = Literal["per_microbatch"] | None
Losses = (
    tuple[jax.Array, jax.Array] | tuple[jax.Array, jax.Array, Mapping[str, jax.Array]]
)


class ModuleLoss(Protocol):
    def __call__(self, model: Any, batch: Any, is_training: bool) -> Losses:
        """(losses, weights) or (losses, weights, metrics), all arrays of one shape:
        [B], or [B, T] for tokens.

        `model` is the user's module, ready to be called; `batch` any tree of arrays
        whose first dim is rows, as many as there are. Each row's loss is its own.
        Metrics are averaged by the weights, as the loss is.
        """
        ...


class Bridged(NamedTuple):
    """init(key, example_batch) -> (params, model_state), plain trees of arrays, each
    whole on every device. update_state(model_state, stats of the loss) -> the next
    model_state: running statistics move, all else in it stays."""

    init: Callable[[jax.Array, Any], tuple[Tree, Tree]]
    loss_fn: LossFn
    update_state: Callable[[Tree, Any], Tree]


def from_linen(
    module: nn.Module,
    loss: ModuleLoss,
    *,
    rows: Callable[[Any], jax.Array] | None = None,
    batch_stats: BatchStats = None,
) -> Bridged:
    """A linen module as functions.

    rows: gives each row's global id [B], and turns randomness on: each row passes alone
    (as a batch of one) with a key of its own, so that its dropout mask is the same on
    every mesh and for any number of microbatches. Without it the module must not draw.
    batch_stats: allows flax's BatchNorm, see the module's text; rows then pass together
    and draw from one key, that of their microbatch.
    Errors: ValueError for batch statistics without `batch_stats`, or a module that
    draws without `rows`.
    """

    def split(variables: Tree) -> tuple[Tree, Tree]:
        collections = dict(nn.meta.unbox(variables))
        collections.pop(running_norm.SUMS, None)
        if "batch_stats" in collections and not batch_stats:
            raise ValueError(_BATCH_STATS.format(what="collection 'batch_stats'"))
        return collections.pop("params", {}), collections

    def init(key, batch):
        variables = nn.init(lambda model, b: loss(model, b, False), module)
        make = lambda key, batch: split(variables(key, batch))
        return jax.sharding.auto_axes(make, out_sharding=jax.P())(key, batch)

    def losses(params, model_state, batch, key, is_training):
        split(model_state)
        mutable = ["batch_stats", running_norm.SUMS] if is_training else []
        apply = nn.apply(
            lambda model, b: loss(model, b, is_training), module, mutable=mutable
        )
        try:
            result, changed = apply({"params": params, **model_state}, batch, rngs=key)
        except flax.errors.InvalidRngError as error:
            raise ValueError(_NO_ROWS) from error
        sums = changed.pop(running_norm.SUMS, {})
        return result, _stats(changed, {running_norm.STATS: sums} if sums else {})

    return Bridged(init, _loss_fn(losses, rows, batch_stats), _update_state)


def from_nnx(
    module_or_factory: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    loss: ModuleLoss,
    *,
    rows: Callable[[Any], jax.Array] | None = None,
    batch_stats: BatchStats = None,
) -> Bridged:
    """An nnx module, or a factory `Rngs -> module`, as functions.

    `nnx.Param`s are trained. A module already built starts from its own parameters, and
    `init` ignores its key. In training `module.train()` is in force, else
    `module.eval()`. rows, batch_stats: as in `from_linen`, for `nnx.BatchStat`. Errors:
    ValueError for `nnx.BatchStat` without `batch_stats`, for a module that changes
    another variable, or that has random streams and no `rows`.
    """
    kinds = (nnx.Param, nnx.RngState, running_norm.RunningSum, ...)
    if isinstance(module_or_factory, nnx.Module):
        build = lambda key: module_or_factory
        abstract = module_or_factory
    else:
        build = lambda key: module_or_factory(nnx.Rngs(key))
        abstract = nnx.eval_shape(lambda: build(0))
    if nnx.to_pure_dict(nnx.state(abstract, nnx.BatchStat)) and not batch_stats:
        raise ValueError(_BATCH_STATS.format(what="nnx.BatchStat"))
    graph, *states = nnx.split(abstract, *kinds)

    def init(key, batch):
        del batch

        def make(key):
            _, params, _, _, others = nnx.split(build(key), *kinds)
            return nnx.to_pure_dict(params), nnx.to_pure_dict(others)

        return jax.sharding.auto_axes(make, out_sharding=jax.P())(key)

    def losses(params, model_state, batch, key, is_training):
        if is_training and key is None and jax.tree.leaves(states[1]):
            raise ValueError(_NO_ROWS)
        streams = _streams(states[1], jax.random.key(0) if key is None else key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), nnx.to_pure_dict(states[2]))
        pure = (params, streams, zeros, model_state)
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
        if not is_training:
            return result, _stats({}, {})
        kept = (nnx.BatchStat, running_norm.RunningSum)
        return result, _stats(*(nnx.to_pure_dict(nnx.state(model, k)) for k in kept))

    return Bridged(init, _loss_fn(losses, rows, batch_stats), _update_state)


def make_task(
    bridged: Bridged,
    layout: Layout,
    *,
    stream: Stream,
    eval_sets: Mapping[str, evaluate.Rows],
    **others: Any,
) -> Task:
    """The `Task` of a module on a stream of batches as its loss takes them; `others`
    are further fields of it. Specs are those of `specs_for`."""
    example = stream.batch(0, np.arange(1))
    first = lambda key: bridged.init(key, example)
    with jax.set_mesh(layout.mesh):
        params, _ = jax.eval_shape(first, jax.random.key(0))
    return Task(
        specs=specs_for(params, layout),
        loss_fn=bridged.loss_fn,
        stream=stream,
        eval_sets=eval_sets,
        first=first,
        update_state=bridged.update_state,
        **others,
    )


def specs_for(params: Tree, layout: Layout) -> Tree:
    """Specs for parameters that have none.

    The largest dim that divides over ZeRO's axes is `embed`, the dim that ZeRO shards;
    arrays without one are replicated. Kinds go by flax's names and ranks: `embedding`
    tables, vectors, and matrices whose last dim is what they put out.
    """
    parts = sharding.axis_product(layout.mesh, layout.optimizer.embed)

    def spec(path: str, leaf) -> ParamSpec:
        fits = [
            dim for dim, size in enumerate(leaf.shape) if size and size % parts == 0
        ]
        split = max(fits, key=lambda dim: leaf.shape[dim], default=None)
        axes = tuple("embed" if dim == split else None for dim in range(leaf.ndim))
        kind, contract = "vector", ()
        if leaf.ndim > 1 and path.rpartition("/")[2] == "embedding":
            kind = "embedding"
        elif leaf.ndim > 1:
            kind, contract = "matrix", tuple(range(leaf.ndim - 1))
        return ParamSpec(tuple(leaf.shape), axes, contract, kind, _no_initializer)

    return unflatten(params, [spec(path, leaf) for path, leaf in named(params)])


def shardings_for(
    params: Tree, tx: optax.GradientTransformation, layout: Layout
) -> Shardings:
    """Where parameters without specs, their gradients and the state of `tx` live.

    `tx` must take the keyword `step`: wrap a plain one in
    `optax.with_extra_args_support`.
    """
    return state.make_shardings(specs_for(params, layout), tx, layout)


_BATCH_STATS = (
    "the module has {what}: with them a result depends on which rows shared a "
    "microbatch; use a norm of interop.running_norm, whose sums merge in any order, or "
    "LayerNorm, RMSNorm or GroupNorm, or allow them by batch_stats='per_microbatch'"
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


def _stats(values: Tree, sums: Tree) -> Tree:
    """What one microbatch tells `_update_state`: updated values, to be averaged over
    `count` microbatches, and sums; both trees of the model state's paths."""
    return {"values": values, "count": jnp.float32(1.0), "sums": sums}


def _update_state(model_state: Tree, stats: Any) -> Tree:
    def mean(path, old: jax.Array) -> jax.Array:
        new = stats["values"]
        for entry in path:
            new = new.get(entry.key, {})
        return (new / stats["count"]).astype(old.dtype) if _is_array(new) else old

    model_state = jax.tree_util.tree_map_with_path(mean, model_state)
    return running_norm.updated(model_state, stats["sums"])


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


def _loss_fn(
    losses: Callable, rows: Callable[[Any], jax.Array] | None, batch_stats: BatchStats
) -> LossFn:
    """The LossFn of `losses(params, model_state, batch, key, is_training)`, which gives
    (what a `ModuleLoss` gives, stats)."""

    def one_by_one(params, model_state, batch, key):
        def one(row, number):
            own_key = jax.random.fold_in(key, number)
            batch = jax.tree.map(lambda x: x[None], row)
            return losses(params, model_state, batch, own_key, True)

        assert rows is not None
        result, stats = jax.vmap(one)(batch, rows(batch))
        return result, jax.tree.map(lambda x: jnp.sum(x, axis=0), stats)

    def sums(params, model_state, batch, key):
        if key is None or rows is None:
            args = (params, model_state, batch, None, key is not None)
            result, stats = losses(*args)
        elif batch_stats:
            own_key = jax.random.fold_in(key, rows(batch)[0])
            result, stats = losses(params, model_state, batch, own_key, True)
        else:
            result, stats = one_by_one(params, model_state, batch, key)
        values, weights, metrics = (*result, {})[:3]
        for name, x in {"losses": values, **metrics}.items():
            if x.shape != weights.shape:
                raise ValueError(
                    f"the loss gave {name} of shape {x.shape} and weights of shape "
                    f"{weights.shape}; they must be of one shape, a weight for each"
                )
        weights = weights.astype(jnp.float32)
        total = lambda x: jnp.sum(x.astype(jnp.float32) * weights)
        metrics = {name: total(x) for name, x in metrics.items()}
        return total(values), Aux(jnp.sum(weights), metrics, stats)

    def loss_fn(params, model_state, batch, key):
        automatic = jax.sharding.auto_axes(sums, out_sharding=jax.P())
        return automatic(params, model_state, batch, key)

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
    """Path -> value of every variable that a call may not change."""
    may_change = (nnx.RngState, nnx.BatchStat, running_norm.RunningSum)
    _, *_, kept = nnx.split(model, *may_change, ...)
    return {path: v.get_value() for path, v in nnx.to_flat_state(kept)}


def _no_initializer(key, shape, dtype):
    raise ValueError("these parameters come from a flax module: use Bridged.init")
