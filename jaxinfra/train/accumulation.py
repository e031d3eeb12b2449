"""Accumulation that sums gradients over devices once a step, and not a microbatch.

`objective.accumulate` leaves every sum to the types of arrays: where devices have rows
of their own, the gradients of each microbatch are summed over all of them. Over an axis
that splits rows and not the sum of gradients (`data`; with zero 0 or 1 `fsdp` too) each
device may as well add up its own microbatches first. So here the same loop runs inside
a shard_map that is manual over these axes, and what it made is summed once after it.
`sharding.spec` leaves out axes that are taken, so losses run there as they are.

Over `fsdp` with zero 2 or 3 each device keeps a part of the sum, into which every
microbatch is summed at once: its whole sum would not fit. Over `expert`, `context` and
`tensor` activations travel too, and they stay with the types.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxinfra.config import Config
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Axes, Layout
from jaxinfra.train import objective
from jaxinfra.train.objective import GradFn, Gradients, Maxima


def axes_summed_once(config: Config, layout: Layout) -> Axes:
    """The mesh axes over which `config` has gradients summed once a step; () where all
    sums are of every microbatch. A task of a user's own may look from row to row, so
    it stays as its arrays' types have it."""
    if config.parallel.reduce_once == "false" or config.task != "text":
        return ()
    axes = (axis for axis in layout.params.rows if axis not in layout.grads.embed)
    return tuple(axis for axis in axes if layout.mesh.shape[axis] > 1)


def accumulate_once(
    grad_fn: GradFn,
    microbatches: int,
    *,
    shardings: Tree,
    axes: Axes,
    policy: Policy,
) -> GradFn:
    """What `objective.accumulate` gives, summed over `axes` after the last microbatch,
    in `policy.reduce`. `grad_fn` is of rows that have nothing to do with each other,
    and says by `sharding.spec` where its activations are."""
    places = jax.tree.map(lambda place: place.spec, shardings)
    is_maxima = lambda node: isinstance(node, Maxima)
    own = objective.accumulate(grad_fn, microbatches, shardings=places)

    def met(node: Any) -> Any:
        return (jax.lax.pmax if is_maxima(node) else jax.lax.psum)(node, axes)

    def body(params, model_state, batch, key) -> Gradients:
        made = own(params, model_state, batch, key)
        made = made._replace(grads=optax.tree.cast(made.grads, policy.reduce))
        made = jax.tree.map(met, made, is_leaf=is_maxima)
        return made._replace(grads=optax.tree.cast(made.grads, jnp.float32))

    return jax.shard_map(
        body,
        in_specs=(jax.P(), jax.P(), jax.P(axes), jax.P()),
        out_specs=jax.P(),
        axis_names=set(axes),
        check_vma=False,  # every sum over these axes is made here, by hand
    )
