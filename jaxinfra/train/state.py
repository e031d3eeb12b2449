"""The state of training: one tree, made sharded, described for restore."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfra import params as params_lib
from jaxinfra.params import Tree
from jaxinfra.sharding import Layout


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
    return Shardings(
        params=params_lib.shardings(specs, layout, layout.params),
        grads=params_lib.shardings(specs, layout, layout.grads),
        optimizer=optimizer,
        opt_state=params_lib.unflatten(
            opt_state,
            [
                whole if of is None else places[of]
                for of in _parameters_of(opt_state, specs, layout)
            ],
        ),
    )


def abstract_opt_state(
    tx: optax.GradientTransformation, specs: Tree, layout: Layout
) -> Tree:
    """Shapes and dtypes of the optimizer's state, without shardings."""
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            params_lib.physical_shape(s, layout), jnp.float32
        ),
        specs,
    )
    return jax.eval_shape(tx.init, params)


def init_opt_state(
    tx: optax.GradientTransformation, params: Tree, shardings: Shardings
) -> Tree:
    """The optimizer's first state, made sharded."""
    init = jax.sharding.auto_axes(tx.init, out_sharding=shardings.opt_state)
    return jax.jit(init)(params)


def init_state(
    specs: Tree,
    tx: optax.GradientTransformation,
    shardings: Shardings,
    layout: Layout,
    *,
    dtype: jnp.dtype,
    seed: int,
) -> TrainState:
    """The first state: random parameters by `seed`, the same numbers on every mesh."""
    key = jax.random.key(seed)
    params = params_lib.initialize(specs, key, layout=layout, dtype=dtype)
    whole = jax.NamedSharding(layout.mesh, jax.P())
    return TrainState(
        step=jax.device_put(np.int32(0), whole),
        params=params,
        opt_state=init_opt_state(tx, params, shardings),
        model_state=(),
        key=jax.device_put(np.asarray(jax.random.key_data(key)), whole),
    )


def abstract_state(
    specs: Tree,
    tx: optax.GradientTransformation,
    shardings: Shardings,
    layout: Layout,
    *,
    dtype: jnp.dtype,
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`'s result; nothing is computed."""
    whole = jax.NamedSharding(layout.mesh, jax.P())
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        params=params_lib.abstract(specs, layout, layout.params, dtype),
        opt_state=jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            abstract_opt_state(tx, specs, layout),
            shardings.opt_state,
        ),
        model_state=(),
        key=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole),
    )


def logical_shapes(
    state: TrainState, specs: Tree, layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Path -> shape without the vocabulary's padding, of every array of `state`."""
    by_path = dict(params_lib.named(specs))
    return {
        path: tuple(leaf.shape) if of is None else by_path[of].shape
        for (path, leaf), of in zip(
            params_lib.named(state), _parameters_of(state, specs, layout), strict=True
        )
    }


def _parameters_of(tree: Tree, specs: Tree, layout: Layout) -> list[str | None]:
    """For every leaf, the path of the parameter that it is, or is a moment of; None for
    other leaves. A moment's path ends in its parameter's and its shape is the same."""
    shapes = {
        path: params_lib.physical_shape(spec, layout)
        for path, spec in params_lib.named(specs)
    }

    def parameter(path: str, shape: tuple[int, ...]) -> str | None:
        parts = path.split("/")
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            if shapes.get(tail) == tuple(shape):
                return tail
        return None

    return [parameter(path, leaf.shape) for path, leaf in params_lib.named(tree)]
