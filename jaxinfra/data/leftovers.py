"""Names of files that are not whole yet, which say whose they are.

    .NAME.MACHINE-PID-STARTED-RANDOM.tmp

What a killed process leaves behind is so found by the next one, and removed; never what
a living process writes. Limits: where there is no /proc, and of what was left before
the machine was started again or by another machine, nothing is known, and it stays.
"""

import functools
import hashlib
import os
import pathlib
import re
import secrets
import shutil

_NAME = re.compile(r"\.(.+)\.([0-9a-f]{12})-(\d+)-(\d+)-[0-9a-f]{8}\.tmp")


def new_owner() -> str:
    """MACHINE-PID-STARTED-RANDOM of this process, each time another."""
    pid = os.getpid()
    return f"{_machine()}-{pid}-{_started(pid) or 0}-{secrets.token_hex(4)}"


def temporary(path: pathlib.Path, owner: str) -> pathlib.Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f".{path.name}.{owner}.tmp")


def remove_dead(folder: pathlib.Path, name: str = "") -> None:
    """Removes what dead processes left in a folder, of files of one name or of all."""
    if not folder.is_dir():
        return
    for path in folder.glob(".*.tmp"):
        found = _NAME.fullmatch(path.name)
        if not found or (name and found[1] != name) or found[2] != _machine():
            continue
        if not _knows_processes() or _started(int(found[3])) == int(found[4]):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    """This start of this machine, and the processes that are seen in its container."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    known = f"{boot.read_text()}{_namespace()}" if _knows_processes() else ""
    return hashlib.sha256(known.encode()).hexdigest()[:12]


@functools.cache
def _knows_processes() -> bool:
    return _started(os.getpid()) is not None and bool(_namespace())


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process here started, None if there is none; a zombie counts as gone.
    Source: proc(5), field 22 of stat."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in parentheses, may hold spaces: count from its end.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])
