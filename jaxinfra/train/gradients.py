"""From a loss to the gradient of its sum: whole, or in microbatches.

A `GradFn` has a LossFn's arguments and returns `Gradients` of the *sum*; wrappers
compose: `accumulate(grad_of(loss), 4)`.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxinfra.train.objective import Aux, LossFn


class Gradients(NamedTuple):
    """grads: a tree like params, of the loss sum. loss_sum: float32."""

    grads: Any
    loss_sum: jax.Array
    aux: Aux


class GradFn(Protocol):
    """A LossFn's arguments -> the gradient of its sum with respect to params."""

    def __call__(
        self, params: Any, model_state: Any, batch: Any, key: jax.Array | None
    ) -> Gradients: ...


def grad_of(loss_fn: LossFn) -> GradFn:
    """Reverse-mode gradient of the loss sum with respect to params."""

    def grad_fn(params, model_state, batch, key):
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss_sum, aux), grads = value_and_grad(params, model_state, batch, key)
        return Gradients(grads, loss_sum, aux)

    return grad_fn


def accumulate(grad_fn: GradFn, microbatches: int, *, shardings: Any) -> GradFn:
    """Sums `grad_fn` over `microbatches` parts of the batch, one after another.

    Row r goes to part r % microbatches, so that no row leaves its device. `shardings`:
    of the sum of gradients, a tree like params; zero >= 2 keeps it sharded over fsdp.
    """

    def split(x: jax.Array) -> jax.Array:
        over_rows, *others = jax.typeof(x).sharding.spec
        parts = jax.lax.reshape(
            x,
            (x.shape[0] // microbatches, microbatches, *x.shape[1:]),
            out_sharding=jax.P(over_rows, None, *others),
        )
        return jnp.swapaxes(parts, 0, 1)

    def placed(result: Gradients) -> Gradients:
        return result._replace(grads=jax.tree.map(jax.reshard, result.grads, shardings))

    def accumulated(params, model_state, batch, key):
        if microbatches == 1:
            return placed(grad_fn(params, model_state, batch, key))

        def add(total, part):
            result = placed(grad_fn(params, model_state, part, key))
            return jax.tree.map(jnp.add, total, result), None

        parts = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], parts)
        total = placed(grad_fn(params, model_state, first, key))
        rest = jax.tree.map(lambda x: x[1:], parts)
        return jax.lax.scan(add, total, rest)[0]

    return accumulated
