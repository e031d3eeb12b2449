"""A config from a file and a command line, and to and from JSON; without jax.

The dataclasses of `jaxinfra.config` are the only list of settings: options, types, help
and JSON follow from their annotations. A key is dotted, `train.steps`; a field named
like a Python keyword drops its underscore, so that `init.from_` is `--init.from`.
"""

import dataclasses
import difflib
import importlib.machinery
import importlib.util
import json
import math
import os
import pathlib
import re
import reprlib
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jaxinfra
from jaxinfra import checks
from jaxinfra.config import (
    TEXT_KEYS,
    Config,
    ConfigError,
    did_you_mean,
    without_secrets,
)

DEFAULT_CONFIG = "tiny"
HELP = ("--help", "-h")

# Beside this file in a wheel (`jaxinfra.configs`), beside the package in a checkout.
_SHIPPED = (
    pathlib.Path(__file__).parent / "configs",
    pathlib.Path(__file__).parent.parent / "configs",
)
_EXPECTED = {
    bool: "true or false",
    int: "an integer in digits, such as 1000",
    float: "a finite number, such as 0.1",
    str: "text",
    tuple: 'a JSON list of objects, such as [{"window": 128}, {}]',
    dict: "an object of settings",
}


class ConfigFile(NamedTuple):
    """What a config file defines: get_config(), and for a task that is not text's
    get_task(config, layout, policy) -> jaxinfra.Task, with TASK_KEYS: those of
    `config.TEXT_KEYS` that it reads too."""

    config: Config
    get_task: Callable[..., Any] | None = None
    task_keys: tuple[str, ...] = ()


def read_command(argv: list[str]) -> tuple[Config, Callable[..., Any] | None]:
    """The checked config that `argv`, without the program's name, asks for, and the
    get_task of its file; None: text.

    `--config` takes a file or a shipped name; `--help` prints every option with the
    defaults of that config and exits 0. Raises ConfigError on all that is wrong.
    """
    texts = _split([word for word in argv if word not in HELP])
    name = texts.pop("config", DEFAULT_CONFIG)
    if not name:
        raise ConfigError("--config has no value; write --config FILE or a name")
    default, get_task, task_keys = load(name)
    if not set(HELP).isdisjoint(argv):
        print(jaxinfra.help_text(default))
        raise SystemExit(0)
    config = _apply(texts, default)
    if config.task == "text":
        get_task = None
    elif get_task is None:
        raise ConfigError(
            f"task=own: config {name!r} defines no get_task; set task to text"
        )
    for key in texts if get_task else ():
        if is_in(key, TEXT_KEYS) and not is_in(key, task_keys):
            raise ConfigError(
                f"--{key} is for text, and config {name!r} has a task of its own that"
                " does not read it; leave it out, or name it in TASK_KEYS of the file"
            )
    checks.check(config)
    return config, get_task


def load_config(path_or_name: str) -> Config:
    """The config of `load`."""
    return load(path_or_name).config


def load(path_or_name: str) -> ConfigFile:
    """What a file defines that is given by path, or shipped by that name.

    A path ends in .py or has a folder in it. The file's code runs, so the path must be
    one that the user typed, never one read from a checkpoint.
    """
    shipped = shipped_configs()
    path = pathlib.Path(path_or_name)
    if path.suffix != ".py" and path.name == path_or_name:
        path = shipped.get(path_or_name)
    if path is None or not os.path.isfile(path):
        name = pathlib.Path(path_or_name).stem
        raise ConfigError(
            f"unknown config {path_or_name!r}; --config takes a file, or the name of a"
            f" shipped one: {', '.join(shipped)}{did_you_mean(name, shipped)}"
        )
    try:
        module = _run_file(path)
        get_config = getattr(module, "get_config", None)
        config = get_config() if callable(get_config) else None
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(_describe(error, path)) from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"{path} gives no config; define get_config() that returns a Config"
        )
    get_task = getattr(module, "get_task", None)
    if get_task is not None and not callable(get_task):
        raise ConfigError(f"{path}: get_task is no function (config, layout, policy)")
    if get_task:
        config = dataclasses.replace(config, task="own")
    config = from_json(to_json(config))  # refuses wrong types, makes 1 a float
    return ConfigFile(config, get_task, tuple(getattr(module, "TASK_KEYS", ())))


def parse(argv: list[str], default: Config) -> Config:
    """`default` with the options in `argv`: `--key value` or `--key=value`.

    A value that begins with `--` needs the second form; a true-or-false option without
    a value is true. Raises ConfigError on unknown, repeated, valueless or ill-typed
    options; rules between settings are `checks.check`.
    """
    return _apply(_split(argv), default)


def to_json(config: Config) -> dict[str, Any]:
    """The config as JSON objects, lists and scalars; `from_json` gives it back."""
    return _plain(config)


def recorded(config: Config) -> dict[str, Any]:
    """`to_json` as it is kept on disk: no URL in it has a password or a signature."""
    return _without_secrets(to_json(config))


def from_json(tree: Any, *, fill: bool = False) -> Config:
    """The config of `to_json`; unknown or missing keys and wrong types are errors.

    `fill`: keys that an older version did not have get their defaults.
    """
    if fill:
        tree = _merge(to_json(Config(name="")), tree)
    return _build(Config, tree, "")


def leaves(config: Config) -> dict[str, Any]:
    """Dotted key -> JSON value, in the order of the dataclasses."""
    return dict(flatten(to_json(config), ""))


# Command line -> raw JSON values


def _split(argv: list[str]) -> dict[str, str | None]:
    """Option -> its text, None where no value follows."""
    texts: dict[str, str | None] = {}
    words = list(reversed(argv))
    while words:
        word = words.pop()
        if not word.startswith("--"):
            key = word.lstrip("-").partition("=")[0]
            hint = _option_hint(key) if key in dict(every_option(Config)) else ""
            raise ConfigError(
                f"unexpected argument {word!r}; options are written --key value{hint}"
            )
        key, equals, text = word[2:].partition("=")
        if key in texts:
            raise ConfigError(f"--{key} is given twice; keep one of the two")
        if not equals:
            text = words.pop() if words and not words[-1].startswith("--") else None
        texts[key] = text
    return texts


def _apply(texts: dict[str, str | None], default: Config) -> Config:
    tree = to_json(default)
    for key, text in texts.items():
        kind = _option_type(key)
        if text is None and kind is bool:
            text = "true"
        if text is None:
            raise ConfigError(f"--{key} has no value; write --{key}={type_name(kind)}")
        node = tree
        *sections, name = key.split(".")
        for section in sections:
            node = node[section]
        node[name] = _read(kind, text, key)
    return from_json(tree)


def _option_type(key: str) -> Any:
    options = dict(every_option(Config))
    for name in (key, f"{key.rpartition('.')[0]}.NAME"):
        if name in options:
            return options[name]
    inside = [f"--{option}" for option in options if option.startswith(f"{key}.")]
    if inside:
        raise ConfigError(
            f"--{key} is a section and takes no value; set one of {', '.join(inside)}"
        )
    hint = _option_hint(key) or "; --help lists all"
    raise ConfigError(f"unknown option --{key}{hint}")


def _option_hint(key: str) -> str:
    """The option most like `key`, as a whole or in its last name."""

    def like(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()

    def score(option: str) -> tuple[float, float]:
        section = like(key.rpartition(".")[0], option.rpartition(".")[0])
        last = like(key.rpartition(".")[2], option.rpartition(".")[2])
        return max(like(key, option), last), section if section > 0.6 else 0.0

    best = max((option for option, _ in every_option(Config)), key=score)
    return f"; did you mean --{best}?" if score(best)[0] >= 0.6 else ""


def _read(kind: Any, text: str, key: str) -> Any:
    """The JSON value that `text` spells; `_build` checks the rest."""
    try:
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if kind is int and re.fullmatch(r"[+-]?\d+(_\d+)*", text, re.ASCII):
            return int(text)
        if kind is float:
            return float(text)
        if typing.get_origin(kind) is tuple:
            defaults = _plain(typing.get_args(kind)[0]())
            return [
                defaults | item if isinstance(item, dict) else item
                for item in _list(json.loads(text), kind, key)
            ]
    except (ValueError, RecursionError):  # RecursionError: JSON nested too deep
        raise _wrong(kind, text, key) from None
    return text


# Raw JSON values <-> dataclasses


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            name: _plain(getattr(value, field))
            for name, (field, _) in fields_of(type(value)).items()
        }
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, dict) else value


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value


def _build(kind: Any, raw: Any, key: str) -> Any:
    """`raw` as a value of type `kind`; `key` is its dotted name."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_record(kind, raw, key)
    if origin is tuple:
        items = enumerate(_list(raw, kind, key))
        return tuple(_build(args[0], item, f"{key}[{i}]") for i, item in items)
    if origin is dict and isinstance(raw, dict):
        return {name: _build(args[1], raw[name], f"{key}.{name}") for name in raw}
    if origin is typing.Literal:
        if isinstance(raw, str) and raw in args:
            return raw
        raise ConfigError(
            f"{key}={reprlib.repr(raw)} must be one of {', '.join(args)}"
            f"{did_you_mean(str(raw)[:80], args)}"
        )
    if kind is float and type(raw) is int and abs(raw) < 2**53:
        raw = float(raw)
    if type(raw) is not kind or (kind is float and not math.isfinite(raw)):
        raise _wrong(kind, raw, key)
    return raw


def _build_record(cls: type, raw: Any, key: str) -> Any:
    if not isinstance(raw, dict):
        raise _wrong(dict, raw, key or "config")
    fields = fields_of(cls)
    prefix = f"{key}." if key else ""
    for name in raw:
        if name not in fields:
            hint = did_you_mean(str(name), fields)
            raise ConfigError(f"unknown key {prefix}{name}{hint}")
    for name in fields:
        if name not in raw:
            raise ConfigError(f"missing key {prefix}{name}; every key must be there")
    return cls(
        **{
            field: _build(kind, raw[name], prefix + name)
            for name, (field, kind) in fields.items()
        }
    )


def _merge(default: Any, given: Any) -> Any:
    if not isinstance(default, dict) or not isinstance(given, dict):
        return given
    both = {key: _merge(default[key], given[key]) for key in default if key in given}
    return default | given | both


def _list(raw: Any, kind: Any, key: str) -> list[Any]:
    if isinstance(raw, list):
        return raw
    raise _wrong(kind, raw, key)


def _wrong(kind: Any, raw: Any, key: str) -> ConfigError:
    expected = _EXPECTED[typing.get_origin(kind) or kind]
    return ConfigError(f"{key}={reprlib.repr(raw)} must be {expected}")


# The shape of Config


def fields_of(cls: type) -> dict[str, tuple[str, Any]]:
    """Name in a key -> (name of the field, its type)."""
    kinds = typing.get_type_hints(cls)
    return {
        field.name.removesuffix("_"): (field.name, kinds[field.name])
        for field in dataclasses.fields(cls)
    }


def every_option(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its type; a dict is `key.NAME`."""
    for name, (_, kind) in fields_of(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from every_option(kind, f"{prefix}{name}.")
        elif typing.get_origin(kind) is dict:
            yield f"{prefix}{name}.NAME", typing.get_args(kind)[1]
        else:
            yield prefix + name, kind


def flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def is_in(key: str, keys: tuple[str, ...]) -> bool:
    """Whether `key` is one of `keys`, or in a section that is."""
    return any(f"{key}.".startswith(f"{of}.") for of in keys)


def type_name(kind: Any) -> str:
    """How the command line writes values of a type."""
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "JSON list"
    return "true|false" if kind is bool else kind.__name__


# Config files


class _Source(importlib.machinery.SourceFileLoader):
    """Compiles the file at each load: no __pycache__ is written or trusted."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def shipped_configs() -> dict[str, pathlib.Path]:
    """Names of configs that come with the package, and their files."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), _SHIPPED[0])
    files = sorted(folder.glob("[!_]*.py"))
    return {file.stem: file for file in files}


def _run_file(path: pathlib.Path) -> types.ModuleType:
    name = f"jaxinfra_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(
        name, path, loader=_Source(name, str(path))
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _describe(error: BaseException, path: pathlib.Path) -> str:
    """Where in the config file, what, and the spelling it may have meant."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else 1)
    wrong = re.search(r"(\w+)\.__init__\(\) .* keyword argument '(\w+)'", str(error))
    fields = [key.rpartition(".")[2] for key, _ in every_option(Config)]
    hint = did_you_mean(wrong[2], fields) if wrong else ""
    return f"{path}:{line}: {type(error).__name__}: {error}{hint}"
