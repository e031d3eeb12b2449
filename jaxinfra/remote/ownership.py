"""`resilience.ownership` for object stores: owner records and fencing numbers.

The owner of attempt 3 is who created `owner.3.json`, and writes a new number into it
every few seconds. Object stores tell no time that hosts agree on, so who finds a record
of another machine watches it: renewed, it is of a live run; the same for a whole lease,
of a dead one.
"""

import dataclasses
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from jaxinfra.config import DataError
from jaxinfra.remote.object_path import ObjectPath
from jaxinfra.resilience import ownership
from jaxinfra.resilience.ownership import Fenced, FolderOwned, Identity

_LOG = logging.getLogger(__name__)
_LOOK_SECS = 1.0


class ObjectOwnership:
    """A folder held under `attempt`, renewed by a thread until `release`."""

    def __init__(self, run_dir: ObjectPath, record: dict[str, Any], renew_secs: float):
        self.attempt = record["attempt"]
        self._run_dir, self._record = run_dir, record
        self._released = threading.Event()
        self._thread = threading.Thread(
            target=self._renew, args=(renew_secs,), name="owner", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raises `Fenced` once a later attempt has the folder; before each commit."""
        newest = max(_attempts(self._run_dir), default=0)
        if newest != self.attempt:
            raise Fenced(
                f"{self._run_dir} was taken over: this run has attempt {self.attempt}, "
                f"the folder attempt {newest}; it must not write there any more"
            )

    def release(self) -> None:
        """Lets the next run in at once; the record stays and keeps the count."""
        self._released.set()
        self._thread.join()
        try:
            self._write(released=True)
        except DataError as error:
            _LOG.warning("the folder is free when its lease is over: %s", error)

    def _renew(self, renew_secs: float) -> None:
        renewed = 0
        while not self._released.wait(renew_secs):
            renewed += 1
            try:
                self._write(renewed=renewed)
            except DataError as error:  # an outage; a later try may come in time
                _LOG.warning("the right to the folder is not renewed: %s", error)

    def _write(self, **changed: Any) -> None:
        if max(_attempts(self._run_dir), default=0) == self.attempt:
            record = self._record | changed
            _path(self._run_dir, self.attempt).write_bytes(json.dumps(record).encode())


def acquire_object(
    run_dir: ObjectPath,
    *,
    lease_secs: float = ownership.LEASE_SECS,
    renew_secs: float = ownership.RENEW_SECS,
    me: Identity | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> ObjectOwnership:
    """Takes a run folder: the first time, or from a dead owner, which takes a lease's
    time if that was on another machine.

    Raises:
      FolderOwned: its owner lives.
    """
    me = me or ownership.this_process()
    while True:
        newest = max(_attempts(run_dir), default=0)
        if newest:
            _refuse_if_alive(run_dir, newest, me, lease_secs, sleep)
        record = dataclasses.asdict(me) | {
            "attempt": newest + 1,
            "id": uuid.uuid4().hex,
        }
        record |= {"released": False, "renewed": 0}
        is_ours = _path(run_dir, newest + 1).create(json.dumps(record).encode())
        found = _attempts(run_dir)
        if is_ours and max(found, default=0) == newest + 1:
            break
        # Lost: others were faster, perhaps by several attempts. Look again.
    for old in found:
        if old <= newest:
            _path(run_dir, old).unlink()
    return ObjectOwnership(run_dir, record, renew_secs)


def is_ours(run_dir: ObjectPath) -> bool:
    """Whether this process is the newest that took the run folder."""
    owner = _owner(run_dir, max(_attempts(run_dir), default=0)) or {}
    return dataclasses.asdict(ownership.this_process()).items() <= owner.items()


def _refuse_if_alive(
    run_dir: ObjectPath,
    attempt: int,
    me: Identity,
    lease_secs: float,
    sleep: Callable[[float], None],
) -> None:
    """Returns once the owner of `attempt` is known to be gone."""
    owner = _owner(run_dir, attempt)
    if owner is None or owner.get("released") is True:
        return
    who = f"pid {owner.get('pid')} on host {owner.get('host')!r}, attempt {attempt}"
    match ownership.is_running_here(owner, me):
        case False:
            return
        case True:
            raise FolderOwned(
                f"{run_dir} is in use by {who}, which lives; wait for it, end it, or "
                "give another --run.dir"
            )
    _LOG.warning("%s was in use by %s: watching for %.0f s", run_dir, who, lease_secs)
    waited_secs = 0.0
    while waited_secs < lease_secs:
        sleep(_LOOK_SECS)
        waited_secs += _LOOK_SECS
        now = _owner(run_dir, attempt)
        if now is None or now.get("released") is True:
            return
        if now != owner:
            raise FolderOwned(
                f"{run_dir} is in use by {who}, heard of just now; wait for it, end it,"
                " or give another --run.dir"
            )


def _owner(run_dir: ObjectPath, attempt: int) -> dict[str, Any] | None:
    try:
        return ownership.parse(_path(run_dir, attempt).read_text())
    except FileNotFoundError:
        return None  # Its successor removed it: the attempt after it exists.


def _path(run_dir: ObjectPath, attempt: int) -> ObjectPath:
    return run_dir / f"owner.{attempt}.json"


def _attempts(run_dir: ObjectPath) -> list[int]:
    return ownership.attempts_of(run_dir.below("owner."))
