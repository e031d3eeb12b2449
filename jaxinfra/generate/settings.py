"""The settings of a command that uses a model and trains none.

Such a command has options of its own, and of a config those that say how a model runs:
devices, precision, sampling. Imports no jax.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence

from jaxinfra import checks, options, runfolder
from jaxinfra.config import AXES, Config, ConfigError, ModelConfig

KEYS = (
    "mesh", "zero", "precision", "run.seed", "data.cache_dir", "runtime.cpu_devices",
    "runtime.devices", "runtime.compile_cache",
)  # fmt: skip


def split(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """(words of the command's own options, words of config keys with their values)."""
    top = {key for key in options.leaves(Config(name="")) if "." not in key}
    own: list[str] = []
    ours: list[str] = []
    target = own
    for word in argv:
        if word.startswith("--"):
            key, equals, _ = word[2:].partition("=")
            is_key = "." in key or key in top
            (ours if is_key else own).append(word)
            # The value of a key is the word after it, of an option all that follow.
            target = ours if is_key and not equals else own
        else:
            target.append(word)
            target = own
    return own, ours


def read(
    words: Sequence[str], default: Config, *, keys: Sequence[str] = KEYS
) -> Config:
    """`default` with the keys in `words`, checked as far as no model is known.

    Raises ConfigError, also for a key that is not in or below `keys`.
    """
    config = options.parse(list(words), default)
    for word in words:
        key = word[2:].partition("=")[0]
        is_known = any(f"{key}.".startswith(f"{known}.") for known in keys)
        if word.startswith("--") and not is_known:
            raise ConfigError(
                f"--{key} changes nothing here; the keys are {', '.join(keys)}"
            )
    known_sizes = [max(getattr(config.mesh, axis), 1) for axis in AXES]
    rows = checks.known_device_count(config) or math.prod(known_sizes)
    config = dataclasses.replace(config, task="own")
    checks.check(_with_rows(config, rows))
    return config


def check_source(option: str, path: str) -> None:
    """Raises ConfigError if there is nothing at the path of a source."""
    if not runfolder.run_and_step(path)[0].exists():
        raise ConfigError(
            f"{option} {path!r} is not there; give a run folder, RUN@STEP, a published "
            "folder or a .gguf file"
        )


def of_source(path: str, default: Config) -> Config:
    """`default` with a run's own sample, seed, precision and cache, if it is a run."""
    run, _ = runfolder.run_and_step(path)
    file = run / "config.json"
    if not (run / runfolder.CHECKPOINTS).is_dir() or not file.is_file():
        return default
    try:
        theirs = options.from_json(json.loads(file.read_text()), fill=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is no config of a run ({error})") from error
    return dataclasses.replace(
        default,
        precision=theirs.precision,
        sample=theirs.sample,
        run=dataclasses.replace(default.run, seed=theirs.run.seed),
        data=dataclasses.replace(default.data, cache_dir=theirs.data.cache_dir),
    )


def for_model(config: Config, model: ModelConfig, *, num_devices: int) -> Config:
    """The config of `read` for one model on so many devices, ready to be laid out."""
    config = dataclasses.replace(config, task="text", model=model)
    return _with_rows(config, num_devices)


def _with_rows(config: Config, rows: int) -> Config:
    """With a batch that any mesh of so many devices divides."""
    train = dataclasses.replace(config.train, batch_size=rows, microbatches=1)
    evaluation = dataclasses.replace(config.eval, batch_size=0)
    return dataclasses.replace(config, train=train, eval=evaluation)
