"""A `jax.profiler` trace of a few steps, by the step that the run is at."""

import pathlib
from collections.abc import Callable

import jax


def make_profile(
    run_dir: pathlib.Path, *, start: int, steps: int
) -> Callable[[int], None]:
    """A function to call before every step, counted from 0: it traces `steps` steps from
    step `start` on into `run_dir`/profile."""
    is_tracing = False

    def profile(step: int) -> None:
        nonlocal is_tracing
        if steps and step == start:
            jax.profiler.start_trace(str(run_dir / "profile"))
            is_tracing = True
        elif is_tracing and step >= start + steps:
            jax.profiler.stop_trace()
            is_tracing = False

    return profile
