"""The faulty disk: `shim.c` built by the machine's C compiler and armed through ctypes.

`shim.c` is loaded by LD_PRELOAD when a worker starts; a forked trial arms it for paths
below a folder, and every thread of that process meets the fault.
"""

import ctypes
import hashlib
import os
import pathlib
import shutil
import subprocess

SOURCE = pathlib.Path(__file__).with_name("shim.c")
OPEN, WRITE, SYNC, RENAME, MKDIR, CLOSE = 1, 2, 4, 8, 16, 32
EVERY = 63  # of these calls
COUNT, KILL, FAIL, SHORT, SLEEP, SPACE = range(6)
FOREVER = 2**62


def build(folder: pathlib.Path) -> pathlib.Path:
    """The shared object, compiled once for each version of the source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = folder / f"shim.{digest}.so"
    if not built.exists():
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise SystemExit("bench.py faults needs a C compiler, cc or gcc")
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{built.name}.{os.getpid()}"
        command = [compiler, "-O2", "-Wall", "-shared", "-fPIC", str(SOURCE)]
        subprocess.run([*command, "-o", str(aside), "-ldl"], check=True)
        os.replace(aside, built)
    return built


def arm(
    folder: pathlib.Path,
    action: int,
    *,
    ops: int = EVERY,
    first: int = 1,
    last: int = FOREVER,
    value: int = 0,
) -> None:
    """From now on, calls `first` to `last` of kinds `ops` below `folder` are faulty.

    value: an errno for FAIL, milliseconds for SLEEP, bytes left for SPACE.
    """
    path = os.fsencode(folder.absolute())
    _loaded().fault_arm(path, ops, action, *map(ctypes.c_long, (first, last, value)))


def disarm() -> None:
    """The disk is well again."""
    _loaded().fault_disarm()


def calls() -> int:
    """Calls of the armed kinds since `arm`."""
    return _loaded().fault_calls()


def acted() -> int:
    """How many of them met the fault and came back."""
    return _loaded().fault_acted()


def _loaded() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.fault_calls.restype = library.fault_acted.restype = ctypes.c_long
    return library
