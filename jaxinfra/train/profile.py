"""A trace of some steps, as profile.steps asks for: for TensorBoard and Perfetto."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def tracing(
    run_dir: pathlib.Path, *, start: int, steps: int
) -> Iterator[Callable[[int], None]]:
    """A function to call before every step, counted from 0: it traces `steps` steps
    from step `start` on into `run_dir`/profile; fewer if the block ends before."""
    is_tracing = False

    def profile(step: int) -> None:
        nonlocal is_tracing
        if steps and step == start:
            jax.profiler.start_trace(str(run_dir / "profile"))
            is_tracing = True
        elif is_tracing and step >= start + steps:
            is_tracing = False
            jax.profiler.stop_trace()

    try:
        yield profile
    finally:
        if is_tracing:
            jax.profiler.stop_trace()
