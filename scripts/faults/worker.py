"""Makes trials in forked children and prints their verdicts, one JSON object a line.

    python worker.py HOME WORK SECS '[["6", 0], ["6", 1]]'

Started by `table` with the shim loaded. It imports what a run imports and touches no
device: a process that has begun to use jax must not be forked.
"""

import importlib
import json
import os
import pathlib
import sys
import time
import traceback

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from faults import rig as rigs  # noqa: E402
from faults import table  # noqa: E402


def main(home: str, work: str, secs: str, jobs: str) -> None:
    # Whatever else is printed goes to the error output.
    verdicts = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    files = {row.number: row.file for row in table.ROWS}
    rig = rigs.Rig(pathlib.Path(home), pathlib.Path(work))
    deadline = time.monotonic() + float(secs) if float(secs) else float("inf")
    for row, number in json.loads(jobs):
        if time.monotonic() > deadline:
            return
        print(json.dumps({"begun": [row, number]}), file=verdicts)
        module = importlib.import_module(f"faults.{files[row]}")
        began = time.monotonic()
        try:
            out = getattr(module, f"trial_{row}")(rig, number)
        except Exception:
            text = traceback.format_exc()
            out = rigs.Outcome(failures=[f"the trial itself failed: {text[-380:]}"])
        told = {"count": out.count, "failures": out.failures, "figures": out.figures}
        told |= {"row": row, "trial": number, "secs": time.monotonic() - began}
        print(json.dumps(told), file=verdicts)


if __name__ == "__main__":
    # The imports of a run, once for all its forks.
    import train  # noqa: F401  # pyright: ignore[reportMissingImports]

    from jaxinfra import experiment, launcher  # noqa: F401
    from jaxinfra.checkpoint import lifecycle, restore  # noqa: F401

    main(*sys.argv[1:])
