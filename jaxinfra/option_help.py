"""What --help prints."""

import dataclasses
import inspect
import json
from typing import Any

from jaxinfra import options
from jaxinfra.config import Config


def help_text(default: Config) -> str:
    """Every option with its type and its value in `default`, section by section."""
    values = options.leaves(default)
    lines = [
        "usage: [--config FILE_OR_NAME] [--key value | --key=value ...]",
        f"configs: {', '.join(options.shipped_configs())}",
        f"values shown: those of config {default.name!r}",
    ]
    for name, cls in _sections().items():
        lines += ["", name or "config", *inspect.cleandoc(cls.__doc__).splitlines()]
        for key, kind in options.every_option(Config):
            if key.rpartition(".")[0].partition(".")[0] == name:
                value = json.dumps(values[key]) if key in values else "(none)"
                lines.append(f"  {f'--{key} {options.type_name(kind)}':<46} {value}")
    return "\n".join(lines)


def _sections() -> dict[str, Any]:
    kinds = {name: kind for name, (_, kind) in options.fields_of(Config).items()}
    return {"": Config} | {
        name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)
    }
