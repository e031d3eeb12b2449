"""The state's way to and from the checkpoints of a run folder that this job owns."""

import contextlib
import math
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

import jaxinfra
from jaxinfra import params as params_lib
from jaxinfra import runfolder
from jaxinfra.checkpoint import commits, lifecycle
from jaxinfra.checkpoint.commits import SaveError, SaveReport
from jaxinfra.checkpoint.processes import GroupError, ProcessGroup
from jaxinfra.config import CheckpointConfig
from jaxinfra.resilience import ownership
from jaxinfra.train.journal import Journal
from jaxinfra.train.state import TrainState, without_frozen


class Owner(NamedTuple):
    """This job's right to the run folder: the first process holds it for all."""

    attempt: int
    check: Callable[[], None]


@contextlib.contextmanager
def owned(run_dir: Any, group: ProcessGroup) -> Iterator[Owner]:
    """Owns the run folder within the block.

    Raises ownership.FolderOwned in every process if a live run has it.
    """
    held: list[ownership.Ownership] = []

    def acquire() -> int:
        held.append(ownership.acquire(run_dir))
        return held[0].attempt

    try:
        attempt = group.from_first("jaxinfra/attempt", acquire)
    except GroupError as error:
        if error.kind == ownership.FolderOwned.__name__:
            raise ownership.FolderOwned(str(error).partition(": ")[2]) from error
        raise
    try:
        yield Owner(attempt, held[0].check if held else lambda: None)
    finally:
        for mine in held:
            mine.release()


class Saver:
    """Saves and restores the state of one run; every process makes one alike.

    `abstract` is the state to restore into, `logical_shapes` what its arrays are
    without padding, `stream` the identity of the data stream. What `journal` was told
    of a step is on disk before that step is committed.
    """

    def __init__(
        self,
        run_dir: Any,
        *,
        abstract: TrainState,
        logical_shapes: dict[str, tuple[int, ...]],
        stream: dict[str, Any],
        config: dict[str, Any],
        settings: CheckpointConfig,
        journal: Journal,
        owner: Owner,
        group: ProcessGroup,
    ):
        self._folder = commits.place(run_dir / runfolder.CHECKPOINTS)
        self._abstract, self._shapes = without_frozen(abstract), logical_shapes
        self._stream, self._config, self._group = stream, config, group
        self._owner, self._journal = owner, journal
        bound = settings.staging_gib * 2**30 or math.inf
        self._staging_bytes = bound
        kinds = (settings.keep_every, settings.keep_best, settings.keep_hours)
        retain = {"retain": jaxinfra.make_retain(settings)} if any(kinds) else {}
        self.rejected: tuple[tuple[int, str], ...] = ()
        self._make = lambda run_id: lifecycle.Checkpointer(
            self._folder,
            keep=settings.keep,
            run_id=run_id,
            attempt=owner.attempt,
            process=group,
            fence=owner.check,
            ready=journal.sync,
            staging_bytes=bound,
            is_deferred=settings.defer_copies,
            **retain,
        )

    def restore(self, *, accept_changes: bool = False) -> TrainState | None:
        """The newest good state, None where the run has none yet.

        Steps that are damaged are passed over and stand in `rejected`. Raises what
        `checkpoint.restore.restore_latest` raises, and ConfigError if the data stream
        is not the one that the state has seen, unless `accept_changes`.
        """

        def begins() -> bool:
            commits.fence_off(self._folder, attempt=self._owner.attempt)
            return not commits.step_folders(self._folder)

        found = None
        if not self._group.from_first("jaxinfra/begins", begins):
            # By its public name, which loads the module: a new run needs none of it.
            found = jaxinfra.newest_state(
                self._folder,
                dict(params_lib.named(self._abstract)),
                self._shapes,
                staging_bytes=self._staging_bytes,
                group=self._group,
                config=self._config,
                stream=self._stream,
                accept_changes=accept_changes,
            )
        run_id = found.metadata["run_id"] if found else uuid.uuid4().hex
        self._checkpointer = self._make(run_id)
        if found is None:
            return None
        self.rejected = found.rejected
        return self._unflatten(found.arrays)

    def _unflatten(self, arrays: dict[str, jax.Array]) -> TrainState:
        names = [name for name, _ in params_lib.named(self._abstract)]
        return params_lib.unflatten(self._abstract, [arrays[name] for name in names])

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save; the state may be donated when this returns."""
        metadata = {"config": self._config, "data": self._stream}
        self._checkpointer.save(
            step,
            dict(params_lib.named(without_frozen(state))),
            metadata=metadata | {"metrics": self._journal.evaluated(step)},
            logical_shapes=self._shapes,
        )

    def poll(self) -> list[SaveReport]:
        """Saves that have ended; raises SaveError for one that failed, and FolderOwned
        if that is because a later run has the folder."""
        return _told(self._checkpointer.poll)

    def wait(self) -> list[SaveReport]:
        """As `poll`, after the running save."""
        return _told(self._checkpointer.wait)

    def close(self) -> list[SaveReport]:
        """As `wait`; the last call."""
        return _told(self._checkpointer.close)


def _told(ended: Callable[[], list[SaveReport]]) -> list[SaveReport]:
    try:
        return ended()
    except SaveError as error:
        if error.kind == ownership.Fenced.__name__:
            raise ownership.Fenced(str(error)) from error
        raise
