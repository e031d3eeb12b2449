"""The loss on held-out sets, and the loss's own metrics, each over the whole set."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxinfra.data import device
from jaxinfra.train import objective
from jaxinfra.train.objective import Aux, LossFn

EvalStep = Callable[[Any, Any, Any], tuple[jax.Array, Aux]]


class Rows(Protocol):
    """A held-out set in batches that read every row once; `data.batches.Evaluation`.

    bytes_per_token: of its text; None where what is predicted is none, or a part of it.
    """

    @property
    def num_batches(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def bytes_per_token(self) -> float | None: ...
    def batch(self, step: int, positions: np.ndarray) -> tuple:
        """As a stream's; rows that fill up the last batch have no weight."""
        ...


class EvalSet(NamedTuple):
    """A held-out set. batches() -> its batches on the devices, each time from the
    start. bytes_per_token: as in `Rows`."""

    batches: Callable[[], Iterator[Any]]
    bytes_per_token: float | None


def make_eval_step(loss_fn: LossFn) -> EvalStep:
    """(params, model_state, batch) -> (sum of the loss, its Aux); no dropout."""

    def eval_step(params, model_state, batch):
        loss_sum, aux = loss_fn(params, objective.unscaled(model_state), batch, None)
        return loss_sum, aux._replace(stats=())

    return eval_step


def eval_set(rows: Rows, *, batches: int, sharding: jax.NamedSharding) -> EvalSet:
    """The rows, each once, in order; at most `batches` batches, 0: all."""
    count = min(batches or rows.num_batches, rows.num_batches)
    place = functools.partial(
        device.to_device, rows.batch, batch_size=rows.batch_size, sharding=sharding
    )
    return EvalSet(lambda: map(place, range(count)), rows.bytes_per_token)


def evaluate(
    eval_step: EvalStep, sets: Mapping[str, EvalSet], params: Any, model_state: Any
) -> dict[str, float]:
    """Metrics `eval/<name>/{loss,tokens}`, those of the loss itself, and for text
    bits_per_byte; `tokens` is the sum of weights.

    The sums are taken on the host in float64: a set may have more tokens than float32
    counts.
    """
    metrics = {}
    for name, held_out in sets.items():
        sums = [eval_step(params, model_state, batch) for batch in held_out.batches()]
        sums = jax.device_get(sums)
        tokens = _sum(aux.weight_sum for _, aux in sums)
        totals = {"loss": _sum(loss for loss, _ in sums)}
        for own in sums[0][1].metrics if sums else ():
            totals[own] = _sum(aux.metrics[own] for _, aux in sums)
        found = {what: total / max(tokens, 1.0) for what, total in totals.items()}
        if held_out.bytes_per_token:
            bits_per_token = found["loss"] / math.log(2)
            found["bits_per_byte"] = bits_per_token / held_out.bytes_per_token
        found["tokens"] = tokens
        metrics |= {f"eval/{name}/{what}": value for what, value in found.items()}
    return metrics


def _sum(values: Iterable[np.ndarray]) -> float:
    return math.fsum(map(float, values))
