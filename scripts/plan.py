"""Plans a training step: `python scripts/plan.py --config C --target T [--key value]`.

T is v5p:2x2x2, v5e:4x4, v6e:4x4 (chips; with --mesh.slices N one slice of N) or
h100:2x8 (nodes x GPUs). The step is compiled by that hardware's own compiler, which
runs here: memory, what travels, time of a step. --analytic: memory alone, by
arithmetic, at once. --json: one object. --dump-hlo DIR: the compiled program and the
object in files there, named by config, target, mesh, remat and a digest of all options.
Options are those of train.py. A step that the compiler refuses because it does not fit
ends with code 2, after what is known without a program. See `jaxinfra.plan`.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys

from jaxinfra import checks, options
from jaxinfra.config import Config, ConfigError, DataError
from jaxinfra.plan import targets
from jaxinfra.plan.targets import Target


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (default: this process's); returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--analytic", action="store_true")
    parser.add_argument("--dump-hlo", type=pathlib.Path, metavar="DIR")
    own, rest = parser.parse_known_args(argv)
    try:
        if own.analytic and own.dump_hlo:
            raise ConfigError(
                "--dump-hlo keeps the program that a compiler makes, and --analytic"
                " makes none; leave one of the two out"
            )
        target = targets.parse(own.target)
        config, get_task = options.read_command(rest)
        target = targets.of_slices(target, config.mesh.slices)
        runtime = dataclasses.replace(config.runtime, devices=target.num_devices)
        config = dataclasses.replace(config, runtime=runtime)
        checks.check(config)
        if own.analytic:
            found = _analytic(config, target)
        else:
            found = _compiled(config, get_task, target, own.dump_hlo)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if own.json:
        print(json.dumps(found, indent=1))
    else:
        from jaxinfra.plan import report

        print(report.text(found))
    if "refused" in found:
        print(f"error: {found['refused']}", file=sys.stderr)
        return 2
    return 0


def _analytic(config: Config, target: Target) -> dict:
    if config.task != "text":
        raise ConfigError(
            f"--analytic knows transformers; config {config.name!r} has a task of its"
            " own: leave --analytic out"
        )
    from jaxinfra.plan import analytic, report

    known = _resolved(config)
    memory = analytic.memory(known, target.num_devices, target.chip.hbm_bytes)
    return report.analytic_plan(known, target, memory)


def _compiled(config, get_task, target: Target, dump_to: pathlib.Path | None) -> dict:
    from jaxinfra.plan import compilers

    compilers.prepare_process(target)
    from jaxinfra.plan import step

    found, compiled = step.plan_step(_resolved(config), target, get_task)
    if dump_to:
        dump_to.mkdir(parents=True, exist_ok=True)
        name = dump_name(config, target, found["mesh"])
        if compiled:
            (dump_to / f"{name}.hlo").write_text(compiled.text)
        (dump_to / f"{name}.json").write_text(json.dumps(found, indent=1))
    return found


def dump_name(config: Config, target: Target, mesh: dict[str, int]) -> str:
    """What a plan's files are called: config, target, mesh and remat to read, and, so
    that plans of other options do not meet, a digest of the whole config."""
    axes = [f"{axis}{size}" for axis, size in mesh.items()]
    digest = hashlib.sha256(repr(config).encode()).hexdigest()[:8]
    words = [config.name, target.name, *axes, config.train.remat, digest]
    return "-".join(words).replace(":", "-")


def _resolved(config: Config) -> Config:
    """`config` with a vocabulary: its own, or that of its tokenizer."""
    if config.task != "text" or config.model.vocab_size:
        return config
    from jaxinfra import tasks

    data = tasks.open_sets(config)
    size = next(iter(data.values())).tokenizer.vocab_size
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model)


if __name__ == "__main__":
    sys.exit(main())
