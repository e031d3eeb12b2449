"""Adafactor, whose second moments are a row and a column of each matrix.

Source: arXiv:1804.04235 algorithms 4 to 6, without momentum.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxinfra.params import ParamSpec, Tree
from jaxinfra.train.optim import STACKS


def adafactor(specs: Tree) -> optax.GradientTransformation:
    """The direction of adafactor, relative to each matrix's own size; decay and
    learning rate come after it."""
    factored = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=2),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return _each_matrix(factored, specs)


def _each_matrix(tx: optax.GradientTransformation, specs: Tree):
    """`tx` for the matrix of every layer and every expert by itself: contracted dims
    are one side of it, the rest the other; vectors stay vectors.

    Padding of the vocabulary is cut off before: no mean may depend on the mesh. The
    state is a tree like params of `tx`'s states; what of it has another shape than its
    parameter, as factored moments have, is whole on every device.
    """

    def over_stacks(function: Callable, spec: ParamSpec) -> Callable:
        for name in spec.axes:
            function = jax.vmap(function) if name in STACKS else function
        return function

    def cut(spec: ParamSpec, x: jax.Array) -> jax.Array:
        x = x[tuple(map(slice, spec.shape))]
        stacks = [size for size, name in zip(spec.shape, spec.axes) if name in STACKS]
        first = len(stacks)
        if spec.kind == "vector":
            return x.reshape(*stacks, -1)
        # Contracted dims come first or last; an embedding contracts none.
        ends = spec.contract or (first,)
        split = max(ends) + 1 if min(ends) == first else min(ends)
        return x.reshape(*stacks, math.prod(spec.shape[first:split]), -1)

    def init(params):
        return jax.tree.map(
            lambda spec, p: over_stacks(tx.init, spec)(cut(spec, p)), specs, params
        )

    def update(updates, states, params=None):
        def one(spec, u, state, p):
            u, state = over_stacks(tx.update, spec)(cut(spec, u), state, cut(spec, p))
            pad = [(0, big - n) for big, n in zip(p.shape, spec.shape, strict=True)]
            return jnp.pad(u.reshape(spec.shape), pad), state

        pairs = jax.tree.map(one, specs, updates, states, params)
        first, second = (
            jax.tree.map(lambda _, pair, i=i: pair[i], specs, pairs) for i in (0, 1)
        )
        return first, second

    return optax.GradientTransformation(init, update)
