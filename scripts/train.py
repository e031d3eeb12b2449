"""Trains a model: `python scripts/train.py [--config FILE_OR_NAME] [--key value ...]`.

With no arguments it trains configs/tiny.py on text that ships with the project, on CPU,
and ends with a sample. `--help` lists every key; `--check` traces the step and stops.
The same command again goes on from the newest checkpoint. Exit codes: see
`jaxinfra.resilience.exitcodes`.
"""

import os
import sys

from jaxinfra import options, runfolder
from jaxinfra.config import ConfigError, DataError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (default: this process's); returns the exit code."""
    try:
        config, get_task = options.read_command(sys.argv[1:] if argv is None else argv)
        runfolder.check_resume(config)
        # The config is good: from here on jax is loaded.
        from jaxinfra import launcher

        return launcher.run(config, get_task)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: after a peer's death jax's own exit handlers wait for it.
    os._exit(code)
