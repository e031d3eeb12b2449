"""Batches of a run's task on the devices, made ahead of the steps that take them."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxinfra import stages
from jaxinfra.config import Config, DataError
from jaxinfra.data import device


def fetched(
    config: Config,
    task: Any,  # a tasks.Task with a stream
    sharding: jax.NamedSharding,
    *,
    start: int,
    tell_damage: Callable[[int, str], None],
    gives_up: Callable[[], bool],
    failed: list[DataError],
) -> Iterator[device.Fetched]:
    """Batches of the task's stream on the devices, from step `start` on, made ahead.

    They end early where `gives_up` says so while one is waited for, or data cannot be
    had, of which `failed` gets the error; of several processes, which must end at the
    same step, that error ends this one.
    """
    sizes = stages.BatchSizes(config.train.batch_size, config.train.batch_ramp)
    assert task.stream is not None
    host_rows = task.stream.batch
    is_alone = jax.process_count() == 1

    def fetch(step: int) -> tuple:
        batch = device.to_device(
            host_rows, step, batch_size=sizes.of(step), sharding=sharding
        )
        for line in task.damage():
            tell_damage(step, line)
        return batch

    batches = device.prefetch(
        fetch,
        start,
        config.train.steps,
        depth=config.data.prefetch,
        gives_up=lambda: is_alone and gives_up(),
    )
    return device.until_none_comes(batches, failed) if is_alone else batches
