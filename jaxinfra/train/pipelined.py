"""Next-token prediction through a pipeline: a `GradFn`, and forward only a `LossFn`.

They give what `objective.next_token_loss` and its gradient give, summed over
microbatches.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra import sharding
from jaxinfra.config import CommConfig, ModelConfig
from jaxinfra.models.transformer import Model
from jaxinfra.ops.loss import LossConfig
from jaxinfra.parallel import pipeline, schedules
from jaxinfra.parallel.chunks import Stack
from jaxinfra.params import Tree
from jaxinfra.quant import communication
from jaxinfra.sharding import Layout, Rules
from jaxinfra.train import accumulation, objective
from jaxinfra.train.objective import GradFn, Gradients, LossFn


class Pipelined(NamedTuple):
    """grad_fn: of a step's batch. loss_fn: of a batch of any size, for evaluation.
    drawing: of the schedule, as text."""

    grad_fn: GradFn
    loss_fn: LossFn
    drawing: str


def make_pipelined(
    model_of: Callable[[Rules], Model],
    cfg: ModelConfig,
    loss_config: LossConfig,
    *,
    layout: Layout,
    schedule: schedules.Schedule,
    document_mask: bool = True,
    remat: str = "none",
    recompute: bool = False,
    unroll: bool = False,
    order_T: np.ndarray | None = None,
    routers: Any = None,
    staged: Callable[..., Model] | None = None,
    comm: CommConfig | None = None,
    tuned: tuple[Tree, Tree] | None = None,
) -> Pipelined:
    """The next-token loss of `cfg` over the pipeline of the layout's mesh.

    model_of(rules): the transformer of `cfg` by these rules; those of loss_config are
    taken, but for what the executor splits itself. schedule: of as many stages as the
    mesh has. remat: what a layer keeps for its backward pass; recompute: whether a
    stage keeps what enters it alone, and runs its layers once more. order_T: where each
    row's tokens stand, of `context.row_order`. routers: of a model with experts.
    staged(model, is_random=has a key): the model that is trained, if its parameters
    come in another form. comm: in how many bits the layers' weights and gradients cross
    the fsdp axis. tuned: (specs of the parameters, whether each is trained), where some
    are not.
    """
    rules = pipeline.inside(loss_config.rules)
    sharp = dataclasses.replace(loss_config, rules=rules, label_smoothing=0.0)
    smooth = dataclasses.replace(loss_config, rules=rules)
    gather, reduce = sharding.all_gather, None
    if comm not in (None, CommConfig()):
        gather, reduce = communication.in_pipeline(comm, loss_config.policy)
    model, is_trained = model_of(rules), None
    if tuned is not None:
        specs, is_trained = tuned
        model = model._replace(specs=specs)
    stack = Stack(
        model, cfg, sharp, remat, recompute, unroll, order_T, routers, is_trained
    )

    def run(table, params, model_state, batch, key, scale=1.0, model=stack.model):
        targets = objective.make_targets(
            batch.tokens_BT1,
            batch.segments_BT1,
            layout.params,
            batch.weights_BT1,
            order_T=order_T,
        )
        parts = pipeline.Microbatches(
            targets.tokens_BT,
            targets.targets_BT,
            targets.weights_BT,
            targets.positions_BT,
            targets.segments_BT if document_mask else None,
            batch.rows_B,
        )
        grads, sums = pipeline.run(
            table,
            stack._replace(model=model, loss=sharp if key is None else smooth),
            params,
            accumulation.split(parts, table.microbatches),
            layout=layout,
            key=key,
            scale=scale,
            router_bias_LE=model_state["router_bias"] if model_state else None,
            gather=gather,
            reduce=reduce,
        )
        metrics, weight = {"log_z_squared": sums.loss.z}, jnp.sum(targets.weights_BT)
        total, told = sums.loss.nll, sums.told
        if routers is None:
            return grads, total, objective.Aux(weight, metrics)
        total = total if key is None else total + told.loss
        return grads, total, objective.Aux(weight, metrics | told.metrics, told.stats)

    def grad_fn(params, model_state, batch, key):
        model = stack.model
        if staged is not None:
            model = staged(model, is_random=key is not None)
        if not isinstance(model_state, objective.Scaled):
            return Gradients(
                *run(schedule, params, model_state, batch, key, model=model)
            )
        scale, inner = model_state.scale, model_state.inner
        grads, loss_sum, aux = run(schedule, params, inner, batch, key, scale, model)
        return Gradients(jax.tree.map(lambda g: g / scale, grads), loss_sum, aux)

    def loss_fn(params, model_state, batch, key):
        parts = sharding.axis_product(layout.mesh, layout.params.batch)
        table = schedules.forward_only(
            stages=schedule.stages,
            virtual=schedule.virtual,
            microbatches=math.gcd(
                len(batch.tokens_BT1) // parts, schedule.microbatches
            ),
        )
        _, loss_sum, aux = run(table, params, model_state, batch, key)
        return loss_sum, aux

    return Pipelined(grad_fn, loss_fn, schedules.draw(schedule))
