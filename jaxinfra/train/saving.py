"""The training state to and from checkpoints: names, padding, data state, ownership."""

import contextlib
import pathlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from jaxinfra import params, runfolder
from jaxinfra.checkpoint import lifecycle, restore
from jaxinfra.checkpoint.errors import CheckpointError
from jaxinfra.checkpoint.processes import GroupError, ProcessGroup
from jaxinfra.config import ConfigError
from jaxinfra.params import Tree
from jaxinfra.resilience import ownership
from jaxinfra.train.state import TrainState


class Owner:
    """This job's right to the run folder: the first process holds it for all."""

    def __init__(self, attempt: int, check: Callable[[], None]):
        self.attempt, self.check = attempt, check


@contextlib.contextmanager
def owned(run_dir: pathlib.Path, group: ProcessGroup) -> Iterator[Owner]:
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
    without padding, `stream` the identity of the data stream.
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        *,
        abstract: TrainState,
        logical_shapes: dict[str, tuple[int, ...]],
        stream: dict[str, Any],
        config: dict[str, Any],
        keep: int,
        owner: Owner,
        group: ProcessGroup,
    ):
        self._folder = run_dir / runfolder.CHECKPOINTS
        self._abstract, self._shapes = abstract, logical_shapes
        self._stream, self._config, self._group = stream, config, group
        self.rejected: tuple[tuple[int, str], ...] = ()
        self._make = lambda run_id: lifecycle.Checkpointer(
            self._folder,
            keep=keep,
            run_id=run_id,
            attempt=owner.attempt,
            process=group,
            fence=owner.check,
        )

    def restore(self, *, accept_changes: bool = False) -> TrainState | None:
        """The newest good state, None where the run has none yet.

        Steps that are damaged are passed over and stand in `rejected`. Raises what
        `checkpoint.restore.restore_latest` raises, and ConfigError if the data stream
        is not the one that the state has seen, unless `accept_changes`.
        """
        found = restore.restore_latest(
            self._folder,
            dict(params.named(self._abstract)),
            logical_shapes=self._shapes,
            process=self._group,
        )
        self._checkpointer = self._make(
            found.metadata["run_id"] if found else uuid.uuid4().hex
        )
        if found is None:
            return None
        self.rejected = found.rejected
        seen = found.metadata["data"]
        if seen != self._stream and not accept_changes:
            changed = [k for k in self._stream if seen.get(k) != self._stream[k]]
            raise ConfigError(
                f"the data stream is not the one of step {found.step}: {changed} "
                "changed; put the data back, choose another --run.dir, or go on by "
                "--run.accept_changes true"
            )
        names = [name for name, _ in params.named(self._abstract)]
        return params.unflatten(self._abstract, [found.arrays[n] for n in names])

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save; the state may be donated when this returns."""
        self._checkpointer.save(
            step,
            dict(params.named(state)),
            metadata={"config": self._config, "data": self._stream},
            logical_shapes=self._shapes,
        )

    def poll(self) -> list[lifecycle.SaveReport]:
        """Saves that have ended; raises SaveError for one that failed."""
        return self._checkpointer.poll()

    def close(self) -> list[lifecycle.SaveReport]:
        """Waits for the running save; raises SaveError if it failed."""
        return self._checkpointer.close()


def restore_params(run_dir: pathlib.Path, abstract: TrainState, specs: Tree) -> Tree:
    """The parameters of the run's newest good checkpoint, laid out as `abstract`'s.

    Raises CheckpointError if there is none.
    """
    wanted = {f"params/{path}": leaf for path, leaf in params.named(abstract.params)}
    shapes = {f"params/{path}": spec.shape for path, spec in params.named(specs)}
    folder = run_dir / runfolder.CHECKPOINTS
    found = restore.restore_latest(folder, wanted, logical_shapes=shapes)
    if found is None:
        raise CheckpointError(f"{folder} has no checkpoint yet; train first")
    return params.unflatten(abstract.params, [found.arrays[name] for name in wanted])
