"""The state of training: one tree, made sharded, described for restore (`saving`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfra import params as params_lib
from jaxinfra import sharding
from jaxinfra.config import ConfigError
from jaxinfra.params import Tree
from jaxinfra.sharding import Layout
from jaxinfra.train import objective, optim
from jaxinfra.train.objective import Frozen, Scaled

# key -> (params, model_state)
First = Callable[[jax.Array], tuple[Tree, Tree]]


class TrainState(NamedTuple):
    """All that a step reads and writes.

    step: int32, steps done. params, opt_state, model_state: trees. key: uint32 data of
    the run's random key, from which each step's is folded.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    model_state: Tree
    key: jax.Array


class Shardings(NamedTuple):
    """NamedShardings. params, grads, optimizer: trees like params, laid out as each of
    the three is at rest. opt_state: a tree like the optimizer's state."""

    params: Tree
    grads: Tree
    optimizer: Tree
    opt_state: Tree


def make_shardings(
    specs: Tree, tx: optax.GradientTransformation, layout: Layout
) -> Shardings:
    """Shardings of a model with these specs and optimizer; moments lie as their
    parameters would under the optimizer's rules, all else is replicated."""
    whole = jax.NamedSharding(layout.mesh, jax.P())
    optimizer = params_lib.shardings(specs, layout, layout.optimizer)
    places = dict(params_lib.named(optimizer))
    opt_state = abstract_opt_state(tx, specs, layout)
    parameters = _parameters_of(opt_state, specs, layout)
    moments = [
        whole if of is None else _placed_moment(places[of], leaf.shape)
        for of, leaf in zip(parameters, jax.tree.leaves(opt_state), strict=True)
    ]
    return Shardings(
        params=params_lib.shardings(specs, layout, layout.params),
        grads=params_lib.shardings(specs, layout, layout.grads),
        optimizer=optimizer,
        opt_state=params_lib.unflatten(opt_state, moments),
    )


def abstract_opt_state(
    tx: optax.GradientTransformation, specs: Tree, layout: Layout
) -> Tree:
    """Shapes and dtypes of the optimizer's state, without shardings."""
    shape = lambda spec: params_lib.physical_shape(spec, layout)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(shape(s), jnp.float32), specs)
    return jax.eval_shape(tx.init, params)


def init_opt_state(
    tx: optax.GradientTransformation, params: Tree, shardings: Shardings
) -> Tree:
    """The optimizer's first state, made sharded; what rests on the host goes there
    array by array."""
    near = jax.tree.map(lambda s: s.with_memory_kind(None), shardings.opt_state)
    init = jax.sharding.auto_axes(tx.init, out_sharding=near)
    put = lambda x: jax.tree.map(jax.device_put, x, shardings.opt_state)
    return jax.jit(lambda params: put(init(params)))(params)


def init_state(
    specs: Tree,
    tx: optax.GradientTransformation,
    shardings: Shardings,
    layout: Layout,
    *,
    dtype: jnp.dtype,
    seed: int,
    first: First | None = None,
    model_state: Callable[[], Tree] = tuple,
    loss_scale: float | None = None,
    begun: tuple[Tree, Tree] | None = None,
) -> TrainState:
    """The first state: random parameters by `seed`, the same numbers on every mesh, or
    what was `begun`: parameters and model state.

    `first` makes parameters, placed here, and model state; else they are as `specs`
    say, of `dtype`, and `model_state()`. `loss_scale`: see Policy.
    """
    key = jax.random.key(seed)
    whole = jax.NamedSharding(layout.mesh, jax.P())
    params, inner = begun or (None, None)
    if first is not None and params is None:
        params, inner = jax.jit(_placed(first, shardings, whole))(key)
    if params is None:
        params = params_lib.initialize(specs, key, layout=layout, dtype=dtype)
    if inner is None:
        inner = jax.device_put(model_state(), whole)
    if loss_scale is not None:
        scale = jax.device_put((np.float32(loss_scale), np.int32(0)), whole)
        inner = Scaled(inner, *scale)
    return TrainState(
        step=jax.device_put(np.int32(0), whole),
        params=params,
        opt_state=init_opt_state(tx, params, shardings),
        model_state=inner,
        key=jax.device_put(np.asarray(jax.random.key_data(key)), whole),
    )


def abstract_state(
    specs: Tree,
    tx: optax.GradientTransformation,
    shardings: Shardings,
    layout: Layout,
    *,
    dtype: jnp.dtype,
    first: First | None = None,
    model_state: Callable[[], Tree] = tuple,
    frozen: Tree = None,
    loss_scale: float | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`'s result; nothing is computed.
    `frozen`: those of parameters that are not trained, None if all are."""
    whole = jax.NamedSharding(layout.mesh, jax.P())
    like = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    if frozen is not None or first is None:
        params = params_lib.abstract(specs, layout, layout.params, dtype)
        inner = jax.eval_shape(model_state)
    else:
        params, inner = jax.eval_shape(first, jax.random.key(0))
        params = jax.tree.map(like, params, shardings.params)
    inner = jax.tree.map(lambda x: like(x, whole), inner)
    if frozen is not None:
        digest = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
        inner = Frozen(inner, frozen, digest)
    if loss_scale is not None:
        dtypes = (jnp.float32, jnp.int32)
        scale = [jax.ShapeDtypeStruct((), x, sharding=whole) for x in dtypes]
        inner = Scaled(inner, *scale)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        params=params,
        opt_state=jax.tree.map(
            like, abstract_opt_state(tx, specs, layout), shardings.opt_state
        ),
        model_state=inner,
        key=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole),
    )


def logical_shapes(
    state: TrainState, specs: Tree, layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Path -> shape without the vocabulary's padding, of every array of `state`."""
    by_path = dict(params_lib.named(specs))
    return {
        path: tuple(leaf.shape) if of is None else _logical(by_path[of], leaf.shape)
        for (path, leaf), of in zip(
            params_lib.named(state), _parameters_of(state, specs, layout), strict=True
        )
    }


def to_use(state: TrainState) -> tuple[Tree, Tree]:
    """(parameters, model state) to evaluate and to sample with: those of the average
    where there is one."""
    params = optim.averaged(state.opt_state, state.params)
    return params, objective.unscaled(state.model_state)


def without_frozen(state: TrainState) -> TrainState:
    """`state` as it is saved."""
    return _map_frozen(lambda frozen: frozen._replace(base=()), state)


def with_frozen(state: TrainState, begun: tuple[Tree, Tree] | None) -> TrainState:
    """A state as it was saved, or its like, with the frozen parameters of `begun`.

    Raises ConfigError if they are not those that it was trained beside.
    """
    if begun is None:
        return state

    def put(saved: Frozen) -> Frozen:
        if not np.array_equal(*jax.device_get((saved.digest, begun[1].digest))):
            raise ConfigError(
                "init.from holds other parameters than those that the run has trained "
                "beside; put them back, or choose another --run.dir"
            )
        return begun[1]._replace(inner=saved.inner)

    return _map_frozen(put, state)


def _logical(spec: params_lib.ParamSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    # Scales of blocks: the last dim, never the padded one, has as many as it has.
    return (
        (*spec.shape[:-1], shape[-1]) if shape[-1:] != spec.shape[-1:] else spec.shape
    )


def _map_frozen(change: Callable[[Frozen], Frozen], tree: Tree) -> Tree:
    is_frozen = lambda x: isinstance(x, Frozen)
    return jax.tree.map(
        lambda x: change(x) if is_frozen(x) else x, tree, is_leaf=is_frozen
    )


def _placed(first: First, shardings: Shardings, whole: jax.NamedSharding) -> First:
    """`first`, its parameters laid out as they are at rest, its model state whole."""

    def placed(key):
        params, model_state = first(key)
        return (
            jax.tree.map(jax.reshard, params, shardings.params),
            jax.tree.map(lambda x: jax.reshard(x, whole), model_state),
        )

    return placed


def _parameters_of(tree: Tree, specs: Tree, layout: Layout) -> list[str | None]:
    """For every leaf, the path of the parameter that it is, or is a moment of; None for
    other leaves. A moment's path ends in its parameter's and its shape is the same; the
    last dim of one in 8 bits (`/values`) has fewer `/scales`."""
    shapes = {
        path: params_lib.physical_shape(spec, layout)
        for path, spec in params_lib.named(specs)
    }

    def parameter(path: str, shape: tuple[int, ...]) -> str | None:
        parts = path.removesuffix("/values").removesuffix("/scales").split("/")
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            known = shapes.get(tail)
            if known == shape:
                return tail
            if path.endswith("/scales") and known and known[:-1] == shape[:-1]:
                return tail
        return None

    return [parameter(path, tuple(leaf.shape)) for path, leaf in params_lib.named(tree)]


def _placed_moment(place: jax.NamedSharding, shape: tuple[int, ...]) -> Any:
    """Where a moment of a parameter at `place` lies: with it, but that scales whose
    blocks would cross the shards are whole."""
    parts = [sharding.axis_product(place.mesh, _axes(entry)) for entry in place.spec]
    kept = [e if n % k == 0 else None for e, n, k in zip(place.spec, shape, parts)]
    return jax.NamedSharding(place.mesh, jax.P(*kept))


def _axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
