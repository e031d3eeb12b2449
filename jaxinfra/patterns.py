"""Patterns on the paths of a spec tree, as `train.freeze`, `lora.targets` and
`quant.skip` take them.

A pattern is one or more whole parts of a path, with `*` and `?` as in file names:
`ffn`, `attention/query`, `pattern/0`, `*norm`.
"""

import fnmatch
from collections.abc import Iterable

from jaxinfra.config import ConfigError, did_you_mean


def is_match(path: str, pattern: str) -> bool:
    """Whether whole parts of `path`, in a row, are as `pattern` says."""
    return fnmatch.fnmatchcase(f"/{path}/", f"*/{pattern.strip('/')}/*")


def matched(
    key: str, patterns: str, paths: Iterable[str], what: str = "parameter"
) -> list[str]:
    """Of `paths`, those that any of the patterns, separated by spaces, matches; each
    must match some, else ConfigError, which names `key`."""
    paths, found = list(paths), []
    for pattern in patterns.split():
        matched = [path for path in paths if is_match(path, pattern)]
        if not matched:
            raise ConfigError(
                f"{key}={patterns!r}: {pattern!r} matches no {what}; there are "
                f"{', '.join(_parts(paths))}{did_you_mean(pattern, _parts(paths))}"
            )
        found += matched
    return found


def _parts(paths: list[str]) -> list[str]:
    """The parts of all paths but numbers, each once."""
    parts = [part for path in paths for part in path.split("/")]
    return [part for part in dict.fromkeys(parts) if not part.isdecimal()]
