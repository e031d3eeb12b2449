"""Continues prompts with the newest checkpoint of a run.

    python scripts/generate.py RUN --prompt "HAMLET." --prompt "KING." [--key value ...]

`--key value` changes any key of the run's config, above all `--sample.tokens 400`,
`--sample.temperature 0` (greedy), `--sample.top_k`, `--sample.top_p` and `--run.seed`;
`--tokens N` is short for the first.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from jaxinfra import checks, options
from jaxinfra.config import ConfigError, DataError, MeshConfig, RuntimeConfig


def main(argv: list[str] | None = None) -> int:
    """Prints each prompt with its continuation; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="run folder")
    parser.add_argument("--prompt", action="append", help="text; may be repeated")
    parser.add_argument("--tokens", type=int, help="new tokens a prompt")
    args, rest = parser.parse_known_args(argv)
    try:
        path = args.run / "config.json"
        if not path.is_file():
            raise ConfigError(f"{args.run} is no run folder: it has no config.json")
        config = options.from_json(json.loads(path.read_text()), fill=True)
        # Sampling takes the devices that are here, whatever the run had.
        config = dataclasses.replace(
            config, mesh=MeshConfig(), runtime=RuntimeConfig(), zero=-1
        )
        if args.tokens is not None:
            rest += ["--sample.tokens", str(args.tokens)]
        config = options.parse([*rest, "--run.dir", str(args.run)], config)
        checks.check(config)
        if not config.sample.tokens:
            raise ConfigError("sample.tokens=0 generates nothing; set --tokens")
        from jaxinfra import launcher

        launcher.prepare_process(config)
        from jaxinfra import experiment
        from jaxinfra.checkpoint.commits import CheckpointError

        try:
            texts = experiment.generate(config, args.prompt or [config.sample.prompt])
        except CheckpointError as error:
            print(f"error: {error}", file=sys.stderr)
            return 12
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n---\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
