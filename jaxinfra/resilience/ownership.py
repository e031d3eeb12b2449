"""One run folder, one live run: owner records and fencing numbers, without `flock`.

The owner of attempt 3 is who created `owner.3.json`; the highest attempt owns the
folder, and the number goes into every checkpoint. Records appear whole (written
aside, then `link`ed, which fails if the name is there), so of two contenders for an
attempt one wins. A record of this machine and boot is checked for a live process at
once. Any other counts as long as it is renewed: its mtime, which the file server
sets, against that of a file written just now, so host clocks need not agree.

Imports no jax. In a job of several processes the first one owns for all.

Limits: `check` and the act that follows are not one; a mount that caches mtimes for
longer than the lease, or sets them from host clocks, may end a lease early or late.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import socket
import threading
import uuid
from collections.abc import Iterable
from typing import Any

import jaxinfra

LEASE_SECS = 30.0
RENEW_SECS = 10.0

_RECORD = re.compile(r"owner\.([1-9][0-9]{0,17})\.json")


class FolderOwned(Exception):
    """Another live run has the folder; a run ends with `exitcodes.FOLDER_OWNED`."""


class Fenced(FolderOwned):
    """This run had the folder and another has taken it over: it must not commit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """A process that no other is mistaken for, on any machine, after any reboot.

    `namespace` tells containers apart that share host name and boot: a pid means
    nothing across them. `started` is in clock ticks since boot.
    """

    host: str
    boot_id: str
    namespace: str
    pid: int
    started: int


class Ownership:
    """A folder held under `attempt`, renewed by a thread until `release`."""

    def __init__(self, run_dir: pathlib.Path, attempt: int, *, renew_secs: float):
        self.attempt = attempt
        self._run_dir = run_dir
        self._record = run_dir / f"owner.{attempt}.json"
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
        with contextlib.suppress(OSError, ValueError):
            record = {**json.loads(self._record.read_text()), "released": True}
            aside = _write_aside(self._run_dir, record)
            os.replace(aside, self._record)

    def _renew(self, renew_secs: float) -> None:
        while not self._released.wait(renew_secs):
            # One failure is no loss: three renewals go into a lease.
            with contextlib.suppress(OSError):
                os.utime(self._record)


def acquire(
    run_dir: Any,
    *,
    lease_secs: float = LEASE_SECS,
    renew_secs: float = RENEW_SECS,
    me: Identity | None = None,
) -> Any:
    """Takes a run folder (made if need be): the first time, or from a dead owner.

    Gives an `Ownership`; for a folder of an object store what does the same there.

    Raises:
      FolderOwned: its owner lives; on another machine: was heard of within the lease.
    """
    if not isinstance(run_dir, str | os.PathLike):
        return jaxinfra.acquire_object(run_dir)
    folder, me = pathlib.Path(run_dir), me or this_process()
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        newest = max(_attempts(folder), default=0)
        attempt = newest + 1
        record = {**dataclasses.asdict(me), "attempt": attempt, "released": False}
        aside = _write_aside(folder, record)
        try:
            if newest:
                _refuse_if_alive(folder, newest, me, aside, lease_secs)
            is_ours = _create(aside, folder / f"owner.{attempt}.json")
        finally:
            aside.unlink(missing_ok=True)
        found = _attempts(folder)
        if is_ours and max(found, default=0) == attempt:
            break
        # Lost: others were faster, perhaps by several attempts. Look again.
        if is_ours:
            (folder / f"owner.{attempt}.json").unlink(missing_ok=True)
    for old in found:
        if old < attempt:
            (folder / f"owner.{old}.json").unlink(missing_ok=True)
    return Ownership(folder, attempt, renew_secs=renew_secs)


def this_process() -> Identity:
    """Who we are, as an owner record says it. Source: proc(5), field 22 of stat."""
    return Identity(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        namespace=_namespace(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
    )


def is_running_here(owner: dict[str, Any], me: Identity) -> bool | None:
    """Whether an owner of this machine and boot lives; None for one of another."""
    machine = (owner.get("host"), owner.get("boot_id"), owner.get("namespace"))
    if machine != (me.host, me.boot_id, me.namespace) or not me.boot_id:
        return None
    return _started(owner.get("pid")) == owner.get("started")


def _refuse_if_alive(
    folder: pathlib.Path,
    attempt: int,
    me: Identity,
    aside: pathlib.Path,
    lease_secs: float,
) -> None:
    path = folder / f"owner.{attempt}.json"
    try:
        with open(path) as file:  # On NFS, opening a file fetches its true mtime.
            age_secs = aside.stat().st_mtime - os.fstat(file.fileno()).st_mtime
            owner = parse(file.read(1 << 16))
    except FileNotFoundError:
        return  # Its successor removed it: the attempt after it exists.
    if owner.get("released") is True:
        return
    who = f"pid {owner.get('pid')} on host {owner.get('host')!r}, attempt {attempt}"
    # After a reboot the lease has run out; a host name alone may be another's too.
    is_running = is_running_here(owner, me)
    if is_running is not None:
        if is_running:
            raise FolderOwned(
                f"{folder} is in use by {who}, which lives; wait for it, end it, or "
                "give another --run.dir"
            )
    elif age_secs < lease_secs:
        raise FolderOwned(
            f"{folder} is in use by {who}, heard of {age_secs:.0f} s ago; if it is "
            f"dead, the folder is free in {lease_secs - age_secs:.0f} s"
        )


def parse(text: str) -> dict[str, Any]:
    """An owner's record; one that cannot be read is of nobody here: its lease
    counts."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_aside(folder: pathlib.Path, record: dict[str, Any]) -> pathlib.Path:
    aside = folder / f".owner.{uuid.uuid4().hex}"
    with open(aside, "x") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return aside


def _create(aside: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether the record could be put under its name, which only one can."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError:  # No hard links here (Drive, some FUSE): a moment without text.
        try:
            with open(path, "x") as file:
                file.write(aside.read_text())
        except FileExistsError:
            return False
    return True


def _attempts(folder: pathlib.Path) -> list[int]:
    return attempts_of(os.listdir(folder))


def attempts_of(names: Iterable[str]) -> list[int]:
    """The attempts of which there are owner records, by the names of a folder."""
    matches = (_RECORD.fullmatch(name) for name in names)
    return [int(match[1]) for match in matches if match]


def _boot_id() -> str:
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: Any) -> int | None:
    """When a process here started, None if there is none; a zombie counts as gone."""
    if type(pid) is not int:
        return None
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in parentheses, may hold spaces: count from its end.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])
