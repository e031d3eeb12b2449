"""When: a save behind the training loop, agreed by all processes, committed at once.

A save copies the arrays to the host and returns; a thread does the rest, agreeing
with the other processes (`processes`), in three moves:

1. the first process makes an empty `<step>.<attempt>.writing`;
2. every process writes its own chunks there and tells their digests;
3. the first process checks its right to the folder (`fence`), syncs, writes the
   manifest, and renames to `<step>`: from here on the step is committed.

A kill before the rename leaves the earlier steps as they were; one after it loses
nothing. A step saved again stands by as `<step>.replaced` until the new one is in.

Limits: the rename decides, so a fenced writer that passes its check at the moment of
a take-over can still commit; its attempt in the manifest tells.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxinfra.checkpoint import commits, integrity, store
from jaxinfra.checkpoint import snapshot as snapshots
from jaxinfra.checkpoint.commits import SaveError
from jaxinfra.checkpoint.processes import GroupError, ProcessGroup

Arrays = Mapping[str, jax.Array]
Shapes = Mapping[str, tuple[int, ...]]
Taken = Mapping[str, snapshots.SnapshotArray]
About = dict[str, Any]  # The manifest's fields that are known when a save starts.

# Counts the saves of this process: the same in all, it names their topics.
_TURN = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveReport:
    """A committed save; `blocked_secs` of its `secs` were taken from the caller.

    `bytes` is the whole checkpoint's, in all processes. `unpruned`: why old steps
    could not be deleted, if they could not; the save is good nevertheless.
    """

    step: int
    blocked_secs: float
    secs: float = 0.0
    bytes: int = 0
    unpruned: str | None = None


class Checkpointer:
    """Saves a run's steps, one at a time; every process makes one and calls it alike.

    Keeps the newest `keep` steps. `attempt` is the owner's fencing number and `fence`
    raises once another owns the run (`resilience.ownership`).
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int,
        run_id: str,
        attempt: int,
        process: ProcessGroup | None = None,
        fence: Callable[[], None] = lambda: None,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1: the newest stays")
        self._folder = pathlib.Path(folder)
        self._keep = keep
        self._about = {"run_id": run_id, "attempt": attempt}
        self._process = process or ProcessGroup()
        self._fence = fence
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: list[concurrent.futures.Future[SaveReport]] = []
        self._finished: list[SaveReport] = []

    def save(
        self,
        step: int,
        arrays: Arrays,
        *,
        metadata: dict[str, Any],
        logical_shapes: Shapes | None = None,
    ) -> None:
        """Starts to save; on return the arrays may be donated. Waits for an earlier
        one.

        `metadata` has two JSON objects, `config` and `data`. `logical_shapes` are
        those of padded arrays, without the padding. How an earlier save ended is told
        by `poll`; its failure does not prevent this one.

        Raises:
          ValueError, CheckpointError: at once, for what can never be saved.
        """
        started = time.monotonic()
        concurrent.futures.wait(self._pending)
        integrity.check_arrays({name: x.dtype.name for name, x in arrays.items()})
        about = {"step": int(step), **self._about, **_plain(metadata)}
        taken = snapshots.take(arrays, logical_shapes=logical_shapes or {})
        topic = f"jaxinfra/save/{next(_TURN)}"
        report = SaveReport(step=step, blocked_secs=time.monotonic() - started)
        self._pending.append(
            self._worker.submit(self._write, topic, taken, about, report)
        )

    def poll(self) -> list[SaveReport]:
        """Saves that ended since the last call; costs nothing while one is running.

        Raises:
          SaveError: one failed, and the same in every process. Reports of others wait.
        """
        failures = []
        for save in [save for save in self._pending if save.done()]:
            self._pending.remove(save)
            try:
                self._finished.append(save.result())
            except SaveError as error:
                failures.append(str(error))
        if failures:
            raise SaveError("; ".join(failures))
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> list[SaveReport]:
        """Waits for the running save; returns and raises as `poll`."""
        concurrent.futures.wait(self._pending)
        return self.poll()

    def close(self) -> list[SaveReport]:
        """`wait`, then ends the thread; must be called, or a last failure is unseen."""
        self._worker.shutdown()
        return self.wait()

    def _write(
        self, topic: str, taken: Taken, about: About, report: SaveReport
    ) -> SaveReport:
        """The save's thread, in every process."""
        started = time.monotonic()
        group, step = self._process, about["step"]
        writing = commits.writing_folder(self._folder, step, about["attempt"])
        try:
            group.from_first(f"{topic}/begin", lambda: self._begin(writing, about))
            group.contribute(topic, lambda: store.write_arrays(writing, taken))
            num_bytes = group.from_first(
                f"{topic}/commit",
                lambda: self._commit(writing, taken, about, group.collect(topic)),
            )
        except (GroupError, jax.errors.JaxRuntimeError) as error:
            if group.rank == 0:
                commits.abandon(writing)
            raise SaveError(f"save of step {step} failed: {error}") from error
        secs = report.blocked_secs + time.monotonic() - started
        unpruned = None
        if group.rank == 0:
            unpruned = commits.prune(self._folder, step=step, keep=self._keep)
        return dataclasses.replace(
            report, secs=secs, bytes=num_bytes, unpruned=unpruned
        )

    def _begin(self, writing: pathlib.Path, about: About) -> None:
        self._fence()
        commits.begin(writing, attempt=about["attempt"])

    def _commit(
        self, writing: pathlib.Path, taken: Taken, about: About, digests: list
    ) -> int:
        """Returns the bytes of the whole checkpoint, without its manifest."""
        records = store.describe_arrays(writing, taken, digests)
        versions = integrity.versions()
        manifest = integrity.Manifest(arrays=records, versions=versions, **about)
        text = integrity.build(manifest)
        commits.write_synced(writing / integrity.MANIFEST, text)
        commits.sync_folders(writing)
        self._fence()
        commits.commit(writing, step=manifest.step)
        return sum(file.bytes for file in manifest.files())


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """A copy as JSON reads it back: later changes by the caller do not reach it."""
    is_dict = all(isinstance(value, dict) for value in metadata.values())
    if set(metadata) != {"config", "data"} or not is_dict:
        raise ValueError(f"metadata {sorted(metadata)} must be dicts: config, data")
    return json.loads(json.dumps(metadata, allow_nan=False))
