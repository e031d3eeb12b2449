"""When: a save behind the training loop, agreed by all processes, committed at once.

A save copies the arrays to the host and returns; a thread does the rest, agreeing
with the other processes (`processes`), in four moves:

1. the first process makes an empty place to write in;
2. every process writes its own chunks there and tells their digests;
3. the first process checks its right to the run (`fence`) and commits (`commits`);
4. before older steps are deleted, every process reads back what it wrote.

A kill before the commit leaves the earlier steps as they were; one after it loses
nothing.
"""

import concurrent.futures
import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

import jaxinfra
from jaxinfra.checkpoint import commits, integrity, store
from jaxinfra.checkpoint import snapshot as snapshots
from jaxinfra.checkpoint.commits import SaveError, SaveReport
from jaxinfra.checkpoint.processes import GroupError, ProcessGroup

Arrays = Mapping[str, jax.Array]
Shapes = Mapping[str, tuple[int, ...]]
About = dict[str, Any]  # The manifest's fields that are known when a save starts.

# Counts the saves of this process: the same in all, it names their topics.
_TURN = itertools.count()


class Checkpointer:
    """Saves a run's steps, one at a time; every process makes one and calls it alike.

    Keeps the newest `keep` steps, and those that `retain` (`retention`) gives of all.
    `attempt` is the owner's fencing number, `fence` raises once another owns the run
    (`resilience.ownership`), `ready` makes durable what belongs to a step before it is
    committed. `staging_bytes`, `is_deferred`: see `snapshot`.
    """

    def __init__(
        self,
        folder: Any,
        *,
        keep: int,
        run_id: str,
        attempt: int,
        process: ProcessGroup | None = None,
        fence: Callable[[], None] = lambda: None,
        ready: Callable[[], None] = lambda: None,
        retain: Callable[[list[tuple[int, Any]]], set[int]] = lambda steps: set(),
        staging_bytes: float = math.inf,
        is_deferred: bool = False,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1: the newest stays")
        self._folder, self._keep, self._retain = commits.place(folder), keep, retain
        self._about = {"run_id": run_id, "attempt": attempt}
        self._process = process or ProcessGroup()
        self._fence, self._ready = fence, ready
        self._staging_bytes, self._is_deferred = staging_bytes, is_deferred
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

        `metadata` has JSON objects: `config`, `data`, and `metrics` if there are any.
        `logical_shapes` are those of padded arrays, without the padding. How an earlier
        save ended is told by `poll`; its failure does not prevent this one.

        Raises:
          ValueError, CheckpointError: at once, for what can never be saved.
        """
        started = time.monotonic()
        concurrent.futures.wait(self._pending)
        integrity.check_arrays({name: x.dtype.name for name, x in arrays.items()})
        about = {"step": int(step), "unix_secs": int(time.time()), **self._about}
        about |= integrity.plain_metadata(metadata)
        taken = snapshots.take(
            arrays,
            logical_shapes=logical_shapes or {},
            staging_bytes=self._staging_bytes,
            is_deferred=self._is_deferred,
        )
        taken.blocked_secs = time.monotonic() - started
        topic = f"jaxinfra/save/{next(_TURN)}"
        save = self._worker.submit(self._write, topic, taken, about, started)
        self._pending.append(save)
        taken.finish()

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
                failures.append(error)
        if failures:
            raise SaveError("; ".join(map(str, failures)), failures[-1].kind)
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
        self, topic: str, taken: snapshots.Snapshot, about: About, started: float
    ) -> SaveReport:
        """The save's thread, in every process."""
        group, step = self._process, about["step"]
        first, written, writing = group.from_first, [], None
        try:
            writing = self._folder / first(f"{topic}/begin", lambda: self._begin(about))
            write = lambda: written.append(store.write_arrays(writing, taken))
            group.contribute(topic, lambda: write() or written[0])
            told = lambda: group.collect(topic)
            commit = lambda: self._commit(writing, taken, about, told())
            name, num_bytes = first(f"{topic}/commit", commit)
            writing = None  # what fails from here on does not undo it
            secs = time.monotonic() - started
            old = first(f"{topic}/old", lambda: self._surplus(step))
            if old:
                final, layouts = self._folder / name, taken.layouts
                read_back = lambda: jaxinfra.read_back(final, written[0], layouts)
                group.contribute(f"{topic}/check", read_back)
                first(f"{topic}/good", lambda: group.collect(f"{topic}/check"))
        except (GroupError, jax.errors.JaxRuntimeError) as error:
            taken.abandon()
            if group.rank == 0 and writing is not None:
                commits.abandon(writing)
            kind = getattr(error, "kind", type(error).__name__)
            raise SaveError(f"save of step {step} failed: {error}", kind) from error
        unpruned = self._prune(old) if old and not group.rank else None
        return SaveReport(
            step=step,
            blocked_secs=taken.blocked_secs,
            secs=secs,
            bytes=num_bytes,
            unpruned=unpruned,
        )

    def _begin(self, about: About) -> str:
        """Begun first and asked then: who takes the run over meanwhile sees it."""
        name = commits.begin(self._folder, step=about["step"], attempt=about["attempt"])
        self._fence()
        return name

    def _commit(
        self, writing: Any, taken: snapshots.Snapshot, about: About, digests: list
    ) -> tuple[str, int]:
        """The step's name, and the bytes of its files but for the manifest."""
        records = store.describe_arrays(writing, taken.layouts, digests)
        versions = integrity.versions()
        manifest = integrity.Manifest(arrays=records, versions=versions, **about)
        text = integrity.build(manifest)
        self._fence()
        self._ready()
        self._fence()
        final = commits.commit(writing, step=manifest.step, manifest=text)
        return final.name, sum(file.bytes for file in manifest.files())

    def _prune(self, names: list[str]) -> str | None:
        """Steps that a later run may have taken over are not deleted."""
        try:
            self._fence()
        except Exception as error:
            return str(error)
        return commits.prune(self._folder, names)

    def _surplus(self, step: int) -> list[str]:
        also = self._retain(commits.step_folders(self._folder))
        return commits.surplus(self._folder, step=step, keep=self._keep, also=also)
