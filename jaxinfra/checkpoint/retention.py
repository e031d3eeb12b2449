"""Which steps stay besides the newest `checkpoint.keep`: every so many steps, the best
by a metric, all of the last hours. Loaded where one of these is asked for.

A step is judged by its manifest alone: when it was saved, and what it was evaluated to.
"""

import heapq
import time
from collections.abc import Callable
from typing import Any

from jaxinfra.checkpoint import checking
from jaxinfra.checkpoint.commits import CheckpointError
from jaxinfra.checkpoint.integrity import Manifest
from jaxinfra.config import CheckpointConfig

Retain = Callable[[list[tuple[int, Any]]], set[int]]


def make_retain(
    settings: CheckpointConfig, *, now: Callable[[], float] = time.time
) -> Retain:
    """retain(steps and where they stand) -> those to keep, as `settings` say.

    Manifests are read where figures of theirs are needed, once for each step; a step
    whose manifest is damaged is kept only by its number.
    """
    known: dict[int, Manifest | None] = {}

    def manifest(step: int, folder: Any) -> Manifest | None:
        if step not in known:
            try:
                known[step] = checking.load(folder)
            except CheckpointError:
                known[step] = None
        return known[step]

    def retain(steps: list[tuple[int, Any]]) -> set[int]:
        every = settings.keep_every
        kept = {step for step, _ in steps if every and step % every == 0}
        if not (settings.keep_hours or settings.keep_best):
            return kept
        found = {step: m for step, folder in steps if (m := manifest(step, folder))}
        since = now() - 3600 * settings.keep_hours
        kept |= {step for step, m in found.items() if m.unix_secs >= since}
        values = {
            step: m.metrics[settings.best_metric]
            for step, m in found.items()
            if isinstance(m.metrics.get(settings.best_metric), int | float)
        }
        choose = heapq.nsmallest if settings.best == "lowest" else heapq.nlargest
        best = choose(settings.keep_best, values.items(), key=lambda item: item[1])
        return kept | {step for step, _ in best}

    return retain
