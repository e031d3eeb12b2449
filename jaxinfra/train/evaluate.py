"""Held-out loss of named sets, in nats a token and bits a byte."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxinfra.data import device, shards
from jaxinfra.data.batches import make_evaluation
from jaxinfra.train.objective import LossFn


class EvalSet(NamedTuple):
    """A held-out set. batches() -> its batches on the devices, each time from the
    start. bytes_per_token: of its text."""

    batches: Callable[[], Iterator[Any]]
    bytes_per_token: float


def make_eval_step(loss_fn: LossFn) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, model_state, batch) -> (sum of the loss, sum of weights); no dropout."""

    def eval_step(params, model_state, batch):
        loss_sum, aux = loss_fn(params, model_state, batch, None)
        return loss_sum, aux.weight_sum

    return eval_step


def eval_set(
    split: shards.Split,
    *,
    length: int,
    batch_size: int,
    batches: int,
    sharding: jax.sharding.Sharding,
) -> EvalSet:
    """The rows of a split, each once, in order; at most `batches` batches, 0: all."""
    rows = make_evaluation(split, length=length, batch_size=batch_size)
    count = min(batches or rows.num_batches, rows.num_batches)
    place = functools.partial(
        device.to_device,
        rows.batch,
        batch_size=batch_size,
        length=length,
        sharding=sharding,
    )
    bytes_per_token = split.text_bytes / split.num_tokens
    return EvalSet(lambda: map(place, range(count)), bytes_per_token)


def evaluate(
    eval_step: Callable[..., tuple[jax.Array, jax.Array]],
    sets: Mapping[str, EvalSet],
    params: Any,
    model_state: Any,
) -> dict[str, float]:
    """Metrics `eval/<name>/{loss,bits_per_byte,tokens}`, each over the whole set.

    The sums are taken on the host in float64: a set may have more tokens than float32
    counts.
    """
    metrics = {}
    for name, held_out in sets.items():
        sums = [eval_step(params, model_state, batch) for batch in held_out.batches()]
        sums = jax.device_get(sums)
        loss_sum = math.fsum(float(loss) for loss, _ in sums)
        tokens = math.fsum(float(weight) for _, weight in sums)
        loss = loss_sum / max(tokens, 1.0)
        metrics[f"eval/{name}/loss"] = loss
        bits_per_token = loss / math.log(2)
        metrics[f"eval/{name}/bits_per_byte"] = (
            bits_per_token / held_out.bytes_per_token
        )
        metrics[f"eval/{name}/tokens"] = tokens
    return metrics
