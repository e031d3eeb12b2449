"""Looks into the checkpoints of a run, moves them to other formats and back.

    python scripts/checkpoint.py list RUN          one line a step
    python scripts/checkpoint.py verify RUN        reads every byte of every step
    python scripts/checkpoint.py inspect RUN       arrays, config, origin of one step
    python scripts/checkpoint.py diff A B          what two steps have different
    python scripts/checkpoint.py prune RUN --keep 3 [--yes]   deletes older steps
    python scripts/checkpoint.py export RUN --to DIR --format orbax|safetensors
    python scripts/checkpoint.py import DIR --to RUN [--step 7] [--like RUN]

RUN is a run folder (a path or URL), its `checkpoints` folder, or one step's folder;
RUN@STEP names a step, and without one the newest good step is meant. All but export and
import work without jax. No step that is there is changed: safe while a run is going on;
`prune` and `import` take the run for themselves, and end with 16 where it lives.

Exit code 0: done, all is as it was written, or A and B are equal; 1: one line for every
file that is not, or that differs; 2: what was asked for cannot be.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jaxinfra
from jaxinfra import runfolder
from jaxinfra.checkpoint import checking, commits
from jaxinfra.checkpoint.commits import CheckpointError
from jaxinfra.config import ConfigError, DataError
from jaxinfra.resilience import exitcodes, ownership


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "list": show,
        "verify": verify,
        "inspect": inspect,
        "diff": diff,
        "prune": prune,
        "export": export,
        "import": import_,
    }
    try:
        return verbs[options.command](options)
    except (OSError, ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exitcodes.INPUT
    except ownership.FolderOwned as error:
        print(f"error: {error}", file=sys.stderr)
        return exitcodes.FOLDER_OWNED


def find_steps(run: str) -> list[tuple[int, Any]]:
    """Committed steps of a run, oldest first; of RUN@STEP that one. Of several saves of
    a step, too, the one that counts is last."""
    place, wanted = runfolder.run_and_step(run)
    if not place.is_dir():
        raise NotADirectoryError(f"{run} is not a folder; give the --run.dir of a run")
    steps = _folder(place / runfolder.CHECKPOINTS)
    found = commits.step_folders(steps) or commits.step_folders(_folder(place))
    if not found:
        beside = commits.step_folders(_folder(place.parent))
        found = [step for step in beside if step[1].name == place.name]
    if not found and not (place / runfolder.CHECKPOINTS).is_dir():
        raise FileNotFoundError(
            f"{run} has no folder 'checkpoints' and no steps; give the --run.dir of a "
            "run that has saved"
        )
    if wanted is not None and wanted not in dict(found):
        raise FileNotFoundError(f"{place} has no step {wanted}, only {[*dict(found)]}")
    return [step for step in reversed(found) if wanted in (None, step[0])]


def good_step(run: str) -> Any:
    """The step that RUN@STEP names, or the newest with a right manifest and sizes."""
    reasons = []
    for _, path in reversed(find_steps(run)):
        try:
            checking.check_sizes(path, checking.load(path))
            return path
        except CheckpointError as error:
            reasons.append(str(error))
    raise CheckpointError(
        f"{run} has no good step: {'; '.join(reasons) or 'none at all'}"
    )


def _folder(path: Any) -> Any:
    """A folder of steps, on disk or in an object store."""
    return commits.place(str(path))


def verify(options: argparse.Namespace) -> int:
    steps, num_bad = find_steps(options.run), 0
    for step, path in steps:
        problems = checking.validate(path)
        for problem in problems:
            print(f"step {step}: {problem}")
        num_bad += bool(problems)
    print(f"{len(steps) - num_bad} of {len(steps)} steps good")
    return exitcodes.BUG if num_bad else exitcodes.DONE


def show(options: argparse.Namespace) -> int:
    for step, path in find_steps(options.run):
        try:
            manifest = checking.load(path)
        except CheckpointError as error:
            print(f"{step:>10}  damaged: {error}")
            continue
        num_bytes = sum(record.bytes for record in manifest.files())
        print(
            f"{step:>10}  {num_bytes / 1e6:.1f} MB in {len(manifest.arrays)} arrays, "
            f"attempt {manifest.attempt}, run {manifest.run_id}"
        )
    return exitcodes.DONE


def inspect(options: argparse.Namespace) -> int:
    for line in jaxinfra.describe_checkpoint(good_step(options.run)):
        print(line)
    return exitcodes.DONE


def diff(options: argparse.Namespace) -> int:
    lines = jaxinfra.diff_checkpoints(good_step(options.run), good_step(options.other))
    print(*lines or ["equal: the same config, the same arrays, bit for bit"], sep="\n")
    return exitcodes.BUG if lines else exitcodes.DONE


def prune(options: argparse.Namespace) -> int:
    """Deletes, as the owner of the run, what is older than the newest good steps."""
    run, step = runfolder.run_and_step(options.run)
    if step is not None or not (run / runfolder.CHECKPOINTS).is_dir():
        raise ConfigError(f"{options.run} is no run that has saved; give its --run.dir")
    if options.keep < 1:
        raise ConfigError(f"--keep {options.keep} must be at least 1: the newest stays")
    owner = ownership.acquire(run)  # A live run has it: FolderOwned.
    try:
        num_good = 0
        for step, path in reversed(find_steps(options.run)):
            if num_good == options.keep:
                print(f"step {step} {'is' if options.yes else 'would be'} deleted")
                if options.yes:
                    owner.check()
                    if why := commits.prune(_folder(path.parent), [path.name]):
                        raise OSError(f"step {step} cannot be deleted: {why}")
            # What stays as a good one is read whole before anything older goes.
            elif problems := checking.validate(path):
                print(f"step {step} stays and does not count: {problems[0]}")
            else:
                num_good += 1
        if not options.yes:
            print("nothing is deleted without --yes")
    finally:
        owner.release()
    return exitcodes.DONE


def export(options: argparse.Namespace) -> int:
    step = good_step(options.run)
    write = {
        "orbax": jaxinfra.export_orbax,
        "safetensors": jaxinfra.export_safetensors,
    }[options.format]
    print(f"{write(step, options.to)} arrays of {step} are in {options.to}")
    return exitcodes.DONE


def import_(options: argparse.Namespace) -> int:
    like = good_step(options.like) if options.like else None
    source, (target, _) = pathlib.Path(options.run), runfolder.run_and_step(options.to)
    count = jaxinfra.import_checkpoint(source, target, step=options.step, like=like)
    print(f"{count} arrays of {options.run} are step {options.step} of {options.to}")
    return exitcodes.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    path = {"metavar": "RUN"}
    for name in ("list", "verify", "inspect"):
        verbs.add_parser(name).add_argument("run", **path)
    verb = verbs.add_parser("diff")
    verb.add_argument("run", **path | {"metavar": "A"})
    verb.add_argument("other", **path | {"metavar": "B"})
    verb = verbs.add_parser("prune")
    verb.add_argument("run", **path)
    verb.add_argument(
        "--keep", type=int, required=True, help="of good steps, at least 1"
    )
    verb.add_argument("--yes", action="store_true", help="delete, and not only tell")
    verb = verbs.add_parser("export")
    verb.add_argument("run", **path)
    verb.add_argument("--to", type=pathlib.Path, required=True, help="a new folder")
    verb.add_argument("--format", choices=("orbax", "safetensors"), required=True)
    verb = verbs.add_parser("import")
    verb.add_argument("run", **path | {"metavar": "DIR"})
    verb.add_argument("--to", required=True, help="a run folder")
    verb.add_argument("--step", type=int, default=0, help="its number there")
    verb.add_argument("--like", help="a run with the config for it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
