"""Looks into the checkpoints of a run, without jax and without a device.

    python scripts/checkpoint.py list RUN      one line a step
    python scripts/checkpoint.py verify RUN    reads every byte of every step

RUN is a run folder, its `checkpoints` folder, or one step's folder. Exit code 0: all
is as it was written; 1: one line for every file that is not; 2: RUN is no run.
"""

import argparse
import pathlib
import sys

from jaxinfra.checkpoint import commits, integrity
from jaxinfra.checkpoint.commits import CheckpointError
from jaxinfra.resilience import exitcodes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("list", "verify"))
    parser.add_argument("run", type=pathlib.Path, metavar="RUN")
    options = parser.parse_args(arguments)
    try:
        steps = find_steps(options.run)
    except (FileNotFoundError, NotADirectoryError) as error:
        print(error, file=sys.stderr)
        return exitcodes.INPUT
    match options.command:
        case "verify":
            return verify(steps)
        case _:
            return show(steps)


def find_steps(run: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """Committed steps of a run, oldest first."""
    if not run.is_dir():
        raise NotADirectoryError(f"{run} is not a folder; give the --run.dir of a run")
    for folder in (run / "checkpoints", run):
        if steps := commits.step_folders(folder):
            return sorted(steps)
    own = [step for step in commits.step_folders(run.parent) if step[1] == run]
    if not own and not (run / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{run} has no folder 'checkpoints' and no steps; give the --run.dir of a "
            "run that has saved"
        )
    return own


def verify(steps: list[tuple[int, pathlib.Path]]) -> int:
    num_bad = 0
    for step, path in steps:
        problems = integrity.validate(path)
        for problem in problems:
            print(f"step {step}: {problem}")
        num_bad += bool(problems)
    print(f"{len(steps) - num_bad} of {len(steps)} steps good")
    return exitcodes.BUG if num_bad else exitcodes.DONE


def show(steps: list[tuple[int, pathlib.Path]]) -> int:
    for step, path in steps:
        try:
            manifest = integrity.load(path)
        except CheckpointError as error:
            print(f"{step:>10}  damaged: {error}")
            continue
        num_bytes = sum(record.bytes for record in manifest.files())
        print(
            f"{step:>10}  {num_bytes / 1e6:.1f} MB in {len(manifest.arrays)} arrays, "
            f"attempt {manifest.attempt}, run {manifest.run_id}"
        )
    return exitcodes.DONE


if __name__ == "__main__":
    sys.exit(main())
