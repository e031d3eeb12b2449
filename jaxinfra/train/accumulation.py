"""Gradients of microbatches, one after another: the sum on a device and over devices.

`accumulate` leaves sums over devices to the types of arrays: where devices have rows of
their own, the gradients of every microbatch are summed over all of them. Over an axis
that splits rows and not the sum of gradients (`data`; with zero 0 or 1 `fsdp` too) a
device may as well add up its own microbatches first. `accumulate_once` runs the same
loop inside a shard_map that is manual over such axes, and sums what it made once, after
it; `sharding.spec` leaves out axes that are taken, so losses run there as they are.

Over `fsdp` with zero 2 or 3 each device keeps a part of the sum, into which every
microbatch is reduced at once: its whole sum would not fit. Once `data` is apart, that
goes over the fast axis, and not over both. Over
`expert`, `context` and `tensor` activations travel too, and they stay with the types.

By the compilers' plans for Llama-3-8B, full remat, 4 microbatches, summed once or each
time: data 2 x fsdp 8 on 16 v5p, 4 or 16 GB a device cross `data`, in 9.98 or 10.03 s,
with 23.7 or 23.4 GB; data 8 x fsdp 8 on 64 H100, 7 or 222 GB cross it, in 3.41 or 3.39
s where a device has 50 GB/s between nodes, 3.83 or 4.96 s where it has 12.5 (fp8: 2.75
or 3.09, 3.17 or 4.70). The sum at the end hides behind nothing: 2 microbatches take
1.78 or 1.71 s there. So `auto` sums 2 of them each time on GPUs, else once.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxinfra import sharding
from jaxinfra.config import Config, ConfigError
from jaxinfra.precision import Policy
from jaxinfra.sharding import Axes, Layout
from jaxinfra.train import objective
from jaxinfra.train.objective import GradFn, Gradients, Maxima

# Microbatches from which on one sum is worth it, with slower networks in mind; of
# platforms that are not here 2.
_PAYS_FROM = {"gpu": 3, "cuda": 3}


def accumulated(
    task: Any, config: Config, layout: Layout, policy: Policy, shardings: Any
) -> GradFn:
    """The gradient of a `tasks.Task` over train.microbatches, in the way of
    parallel.reduce_once; ConfigError if that asks for what the task does not allow."""
    grad_fn = task.grad_fn or objective.grad_of(task.loss_fn)
    microbatches = config.train.microbatches
    if axes := axes_summed_once(config, layout, is_by_row=task.is_by_row):
        how = {"axes": axes, "policy": policy}
        return accumulate_once(grad_fn, microbatches, shardings=shardings, **how)
    return accumulate(grad_fn, microbatches, shardings=shardings)


def axes_summed_once(config: Config, layout: Layout, *, is_by_row: bool) -> Axes:
    """The mesh axes over which `config` has gradients summed once a step; () where all
    sums are of every microbatch. A loss that is not `is_by_row` may look from row to
    row, and stays as its arrays' types have it."""
    wanted, platform = config.parallel.reduce_once, layout.mesh.devices.flat[0].platform
    if wanted == "true" and not is_by_row:
        raise ConfigError(
            "parallel.reduce_once='true' runs the loss on each device's rows alone, and"
            " the task does not say that it may: its is_by_row is false; set that, or"
            " parallel.reduce_once to auto"
        )
    is_few = config.train.microbatches < _PAYS_FROM.get(platform, 2)
    if wanted == "false" or (wanted == "auto" and is_few) or not is_by_row:
        return ()
    rows, cut = layout.params.rows, layout.grads.embed
    # Those of size 1 too: what a shard_map takes must be the first that split rows.
    axes = tuple(axis for axis in rows if axis not in cut)
    return axes if sharding.axis_product(layout.mesh, axes) > 1 else ()


def accumulate(grad_fn: GradFn, microbatches: int, *, shardings: Any) -> GradFn:
    """Sums `grad_fn` over `microbatches` parts of the batch, one after another.

    Row r goes to part r % microbatches, so that no row leaves its device. `shardings`:
    of the sum of gradients, a tree like params; zero >= 2 keeps it sharded over fsdp.
    The sum is float32 whatever the parameters are.
    """
    one = objective.placed(grad_fn, shardings)
    if microbatches == 1:
        return one

    def summed(params, model_state, batch, key):
        of = lambda part: one(params, model_state, part, key)

        def add(total, part):
            return jax.tree.map(_merge, total, of(part), is_leaf=_is_maxima), None

        # From zeros: were the first part outside, a loop of one turn would be none, and
        # the compiler keep the activations of both at once.
        parts = split(batch, microbatches)
        like = jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts))
        return jax.lax.scan(add, jax.tree.map(_zeros, like), parts)[0]

    return summed


def accumulate_once(
    grad_fn: GradFn,
    microbatches: int,
    *,
    shardings: Any,
    axes: Axes,
    policy: Policy,
) -> GradFn:
    """What `accumulate` gives, summed over `axes` after the last microbatch, in
    `policy.reduce`. `grad_fn` is of rows that have nothing to do with each other, and
    says by `sharding.spec` where its activations are."""
    own = accumulate(grad_fn, microbatches, shardings=shardings)

    def met(node: Any) -> Any:
        return (jax.lax.pmax if _is_maxima(node) else jax.lax.psum)(node, axes)

    def body(params, model_state, batch, key) -> Gradients:
        made = own(params, model_state, batch, key)
        made = made._replace(grads=optax.tree.cast(made.grads, policy.reduce))
        made = jax.tree.map(met, made, is_leaf=_is_maxima)
        return made._replace(grads=optax.tree.cast(made.grads, jnp.float32))

    return jax.shard_map(
        body,
        in_specs=(jax.P(), jax.P(), jax.P(axes), jax.P()),
        out_specs=jax.P(),
        axis_names=set(axes),
        check_vma=False,  # every sum over these axes is made here, by hand
    )


def split(batch: Any, microbatches: int) -> Any:
    """[B, ...] -> [M, B / M, ...], where row r is in microbatch r % M.

    So it is too where a device has a part of the rows, a multiple of M, and they are
    counted from the first of these.
    """

    def one(x: jax.Array) -> jax.Array:
        over_rows, *others = jax.typeof(x).sharding.spec
        parts = jax.lax.reshape(
            x,
            (x.shape[0] // microbatches, microbatches, *x.shape[1:]),
            out_sharding=jax.P(over_rows, None, *others),
        )
        return jnp.swapaxes(parts, 0, 1)

    return jax.tree.map(one, batch)


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding and x.sharding.spec)


def _is_maxima(node: Any) -> bool:
    return isinstance(node, Maxima)


def _merge(total: Any, part: Any) -> Any:
    return jax.tree.map(jnp.maximum if _is_maxima(total) else jnp.add, total, part)
