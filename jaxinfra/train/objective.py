"""From a loss to the gradient of its sum: the contracts, and next-token prediction.

A `LossFn` returns the *sum* of the loss and an `Aux` with the sum of the weights. The
step divides once, by the global weight sum, so microbatches and devices of unequal
weight are right. A `GradFn` has a LossFn's arguments and returns `Gradients` of the
sum; wrappers compose: `accumulation.accumulate(grad_of(loss), 4)`.

Under float16 the model state is `Scaled`: `grad_of` takes gradients of the loss times
a scale, and `next_model_state` moves that scale after every step.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfra import sharding
from jaxinfra.models.transformer import Model
from jaxinfra.ops import loss
from jaxinfra.ops.seam import Context
from jaxinfra.sharding import Rules


class Aux(NamedTuple):
    """What a loss reports besides itself; all leaves are summed over microbatches.

    weight_sum: float32, number of targets. metrics: sums, shown divided by weight_sum.
    stats: sums, and `Maxima`, from which `update_state` makes the next model state.
    """

    weight_sum: jax.Array
    metrics: dict[str, jax.Array]
    stats: Any = ()


class Maxima(NamedTuple):
    """A tree of magnitudes of which microbatches keep the largest, not the sum."""

    tree: Any


class LossFn(Protocol):
    """The sum of a loss over a batch: what everything is made of."""

    def __call__(
        self, params: Any, model_state: Any, batch: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """(float32 sum of the loss, Aux); `key` None turns randomness off."""
        ...


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


class Scaled(NamedTuple):
    """A model state, and the loss scale beside it.

    scale: float32, a power of two. good_steps: int32, since it last moved.
    """

    inner: Any
    scale: jax.Array
    good_steps: jax.Array


class Frozen(NamedTuple):
    """A model state, and beside it parameters that no step changes and no checkpoint
    holds (`tune`).

    base: as the model's, None where a parameter is trained. digest: uint32 [2], of the
    parameters that it was made from.
    """

    inner: Any
    base: Any
    digest: jax.Array


# The loss is a sum, so a target's part of it is near 1 and not 1 / tokens: the scale
# that fits may be below 1. Source: arXiv:1710.03740 section 3.2; torch.amp.GradScaler
# (half at an overflow, double after 2000 good steps).
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 2.0**24
GROWTH_STEPS = 2000


class Rows(NamedTuple):
    """A batch as a loss takes it: what the device got, and each row's global id.

    tokens_BT1: any integer dtype, T + 1 tokens. segments_BT1: document number from 1,
    0 is padding. rows_B: uint32. weights_BT1: 1 where a token counts as a target; None
    where all do.
    """

    tokens_BT1: jax.Array
    segments_BT1: jax.Array
    rows_B: jax.Array
    weights_BT1: jax.Array | None = None


class Targets(NamedTuple):
    """Model inputs and outputs, all [B, T]; weight is 1 where a target exists."""

    tokens_BT: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array


class Routers(Protocol):
    """Of a model with experts: `routers.Routers`."""

    def summed(self, told: Any) -> Any: ...


def next_token_loss(
    model: Model,
    loss_config: loss.LossConfig,
    *,
    document_mask: bool = True,
    routers: Routers | None = None,
    order_T: np.ndarray | None = None,
) -> LossFn:
    """Cross-entropy of the next token. Without `document_mask` a row is one document to
    attention; targets across a boundary do not count either way. Without a key targets
    are not smoothed, and what `routers` make of the use of experts is no loss.
    `order_T`: where each row's tokens stand, of `context.row_order`."""
    sharp = dataclasses.replace(loss_config, label_smoothing=0.0)

    def loss_fn(params, model_state, batch: Rows, key):
        t = make_targets(
            batch.tokens_BT1,
            batch.segments_BT1,
            loss_config.rules,
            batch.weights_BT1,
            order_T=order_T,
        )
        context = Context(
            positions_BT=t.positions_BT,
            segments_BT=t.segments_BT if document_mask else None,
            rows_B=batch.rows_B,
            key=key,
            weights_BT=t.weights_BT if routers else None,
            router_bias_LE=model_state["router_bias"] if model_state else None,
            order_T=order_T,
        )
        h_BTD, head_VD, told = model.forward(params, t.tokens_BT, context)
        whole = sharding.spec(loss_config.rules, "batch", "length", "width")
        h_BTD = jax.reshard(h_BTD, whole)
        with jax.named_scope("loss"):
            used = sharp if key is None else loss_config
            sums = loss.cross_entropy(h_BTD, head_VD, t.targets_BT, t.weights_BT, used)
        metrics = {"log_z_squared": sums.z}
        if routers is None:
            return sums.nll, Aux(jnp.sum(t.weights_BT), metrics)
        extra = routers.summed(told)
        total = sums.nll if key is None else sums.nll + extra.loss
        metrics |= extra.metrics
        return total, Aux(jnp.sum(t.weights_BT), metrics, extra.stats)

    return loss_fn


def make_targets(
    tokens_BT1: jax.Array,
    segments_BT1: jax.Array,
    rules: Rules,
    weights_BT1: jax.Array | None = None,
    *,
    order_T: np.ndarray | None = None,
) -> Targets:
    """Shifts by one; a target counts where it belongs to its input's document, and by
    its own weight where there are weights.

    Positions count from the start of each document in the row. T + 1 tokens arrive
    whole; the results are split along length too, in `order_T` if given.
    """
    segments_BT1 = segments_BT1.astype(jnp.int32)
    inputs_BT, nexts_BT = segments_BT1[:, :-1], segments_BT1[:, 1:]
    index_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape)
    before_BT = jnp.pad(inputs_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BT = jnp.where(inputs_BT != before_BT, index_BT, 0)
    counts_BT = ((inputs_BT == nexts_BT) & (nexts_BT > 0)).astype(jnp.float32)
    if weights_BT1 is not None:
        counts_BT *= weights_BT1[:, 1:].astype(jnp.float32)
    targets = Targets(
        tokens_BT=tokens_BT1[:, :-1],
        targets_BT=tokens_BT1[:, 1:],
        weights_BT=counts_BT,
        positions_BT=index_BT - jax.lax.cummax(starts_BT, axis=1),
        segments_BT=inputs_BT,
    )
    if order_T is not None:
        targets = jax.tree.map(lambda x_BT: x_BT[:, order_T], targets)
    split = sharding.spec(rules, "batch", "length")
    return jax.tree.map(lambda x_BT: jax.reshard(x_BT, split), targets)


def grad_of(loss_fn: LossFn) -> GradFn:
    """Reverse-mode gradient of the loss sum with respect to params.

    With a `Scaled` state the backward pass is of the loss times its scale; the
    gradients are divided by it in float32.
    """

    def grad_fn(params, model_state, batch, key):
        is_scaled = isinstance(model_state, Scaled)

        def minimised(params):
            loss_sum, aux = loss_fn(params, unscaled(model_state), batch, key)
            total = loss_sum * model_state.scale if is_scaled else loss_sum
            return total, (loss_sum, aux)

        grads, (loss_sum, aux) = jax.grad(minimised, has_aux=True)(params)
        if is_scaled:
            scale = model_state.scale
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)
        return Gradients(grads, loss_sum, aux)

    return grad_fn


def unscaled(model_state: Any) -> Any:
    """The model state that a LossFn gets."""
    return model_state.inner if isinstance(model_state, Scaled) else model_state


def loss_scale_of(model_state: Any) -> dict[str, jax.Array]:
    """The metric loss_scale, if there is one."""
    return {"loss_scale": model_state.scale} if isinstance(model_state, Scaled) else {}


def next_model_state(
    update_state: Callable[[Any, Any], Any],
    model_state: Any,
    stats: Any,
    is_finite: jax.Array,
) -> Any:
    """`update_state(model_state, stats)`, or as it was if the step is not finite.

    A loss scale moves either way: half after a step that is not finite, double after
    GROWTH_STEPS that were.
    """
    old = unscaled(model_state)
    inner = jax.tree.map(
        lambda n, o: jnp.where(is_finite, n, o), update_state(old, stats), old
    )
    if not isinstance(model_state, Scaled):
        return inner
    scale, good_steps = model_state.scale, model_state.good_steps + 1
    is_due = good_steps >= GROWTH_STEPS
    grown = jnp.where(is_due, jnp.minimum(2 * scale, LARGEST_SCALE), scale)
    scale = jnp.where(is_finite, grown, jnp.maximum(scale / 2, SMALLEST_SCALE))
    good_steps = jnp.where(is_finite & ~is_due, good_steps, 0)
    return Scaled(inner, scale, good_steps)


def is_overflow(metrics: Mapping[str, float]) -> bool:
    """Whether a step that was not finite, with these metrics, can be the loss scale's
    doing, which has fallen for it: the loss itself is finite, the scale not yet the
    smallest."""
    can_fall = metrics.get("loss_scale", 0.0) > SMALLEST_SCALE
    return can_fall and math.isfinite(metrics["loss"])


def placed(grad_fn: GradFn, shardings: Any) -> GradFn:
    """`grad_fn` whose gradients are float32, whatever the parameters are, and lie as
    `shardings` says, a tree like params."""

    def on_its_place(params, model_state, batch, key) -> Gradients:
        result = grad_fn(params, model_state, batch, key)
        move = lambda g, place: jax.reshard(g, place.spec)
        grads = jax.tree.map(move, result.grads, shardings)
        return result._replace(grads=optax.tree.cast(grads, jnp.float32))

    return on_its_place


def numbered(batch: Any, rules: Rules) -> Rows:
    """A `data.packing.Batch`, or (tokens, segments), with the ids of its rows."""
    tokens_BT1, segments_BT1, *weights = getattr(batch, "per_token", batch)
    rows_B = jax.lax.broadcasted_iota(
        jnp.uint32, tokens_BT1.shape[:1], 0, out_sharding=sharding.spec(rules, "batch")
    )
    return Rows(tokens_BT1, segments_BT1, rows_B, *weights)


def with_row_ids(function: Any, rules: Rules, *, is_random: bool = True) -> Any:
    """A LossFn or GradFn of `Rows` as one of a batch from the stream.

    The ids are given before microbatches are cut, so that a row's dropout is its own.
    Not `is_random`: the key is not passed on, so no random number is made, and labels
    are not smoothed either.
    """

    def on_batch(params, model_state, batch, key):
        rows = numbered(batch, rules)
        return function(params, model_state, rows, key if is_random else None)

    return on_batch
