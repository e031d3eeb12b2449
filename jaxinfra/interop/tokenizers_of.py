"""The tokenizer that belongs to a model, wherever that comes from.

A run folder holds it as `tokenizer.json`, in our own form. The files that other
libraries read it by, its chat template among them, are in `tokenizer/` where the run
was converted from a published model, and with its init.from where that has the same
tokenizer; else they are made of our own. A published folder has files of its own; a
GGUF file has it in its metadata.
"""

import contextlib
import json
import logging
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from jaxinfra import runfolder
from jaxinfra.config import ConfigError, DataError, ModelConfig
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data import tokenizer_files
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.data.tokenizer_json import HfTokenizer
from jaxinfra.interop import export, gguf_file

EOS = "eos_token_id"  # an id or a list, in config.json and generation_config.json
_LOG = logging.getLogger(__name__)


def open_tokenizer(path: str, model: ModelConfig | None = None) -> Tokenizer:
    """The tokenizer of the source at `path` (see `pretrained`).

    Raises DataError, which says what to do, where it has none, or one with more ids
    than `model`.
    """
    run, _ = runfolder.run_and_step(path)
    ours = run / runfolder.TOKENIZER
    if not (run / runfolder.CHECKPOINTS).is_dir():
        with folder(path) as files_dir:
            tokenizer = tokenizer_files.load_tokenizer(files_dir)
    elif ours.is_file():
        tokenizer = tokenizers.from_json(json.loads(ours.read_text(encoding="utf-8")))
    else:
        raise DataError(
            f"{run} has no {runfolder.TOKENIZER}; resume the run once, which writes it"
        )
    if model is not None and tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} ids and its model "
            f"{model.vocab_size}; put the tokenizer that the model was trained with "
            "there"
        )
    return tokenizer


def has_tokenizer(path: str | pathlib.Path) -> bool:
    """Whether the source at `path` comes with a tokenizer."""
    run, _ = runfolder.run_and_step(path)
    return (run / runfolder.TOKENIZER).is_file() or bool(files(path))


@contextlib.contextmanager
def folder(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder with the files by which other libraries read the tokenizer of the
    source at `path`: a published one itself, or a copy while the block lasts."""
    run, _ = runfolder.run_and_step(path)
    is_run = (run / runfolder.CHECKPOINTS).is_dir()
    if run.suffix != ".gguf" and not is_run:
        yield run
    else:
        with tempfile.TemporaryDirectory() as made:
            for name, data in files(path).items():
                pathlib.Path(made, name).write_bytes(data)
            yield pathlib.Path(made)


def files(path: str | pathlib.Path) -> dict[str, bytes]:
    """Those files by name; none where the tokenizer is ours alone, or there is none."""
    run, _ = runfolder.run_and_step(path)
    if run.suffix == ".gguf":
        made = gguf_file.tokenizer_files(run)
        return {name: text.encode() for name, text in made.items()}
    if not (run / runfolder.CHECKPOINTS).is_dir():
        found, ends = export.files_of(run), _fields(run / "config.json", EOS)
        if found and ends is not None and export.GENERATION not in found:
            found[export.GENERATION] = json.dumps({EOS: ends}).encode() + b"\n"
        return found
    as_they_came = export.files_of(run / export.TOKENIZER_FOLDER)
    has_own = (run / runfolder.TOKENIZER).is_file()
    if as_they_came or not has_own:
        return as_they_came
    tokenizer = open_tokenizer(str(run))
    begun_from = (_fields(run / "config.json", "init") or {}).get("from", "")
    if begun_from and runfolder.run_and_step(begun_from)[0].exists():
        theirs = files(begun_from)
        if theirs and has_same_ids(begun_from, tokenizer.to_json()):
            return theirs
    return export.tokenizer_files(tokenizer)


def end_ids(path: str) -> list[int]:
    """The ids that the source at `path` names as ends of what it generates, beside its
    tokenizer's EOD."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        ends = json.loads(files(path)[export.GENERATION])[EOS]
        return [int(i) for i in (ends if isinstance(ends, list) else [ends])]
    return []


def has_same_ids(path: str, tokenizer: dict[str, Any]) -> bool:
    """Whether every token of the source at `path` has the same id in `tokenizer`, a
    `Tokenizer.to_json()`; true of a source without a tokenizer that can be read."""
    ours = tokenizers.from_json(tokenizer)
    try:
        if not has_tokenizer(path):
            return True
        theirs = open_tokenizer(path)
        if isinstance(ours, HfTokenizer) and isinstance(theirs, HfTokenizer):
            return _ids(theirs).items() <= _ids(ours).items()
        return ours.digest() == theirs.digest()
    except ConfigError as error:  # an extra that is not here, a kind that is not read
        _LOG.warning("the tokenizer of %s is not compared: %s", path, error)
        return True


def _fields(file: pathlib.Path, name: str) -> Any:
    """A field of a JSON file, None where it has none: `pretrained` says what is
    wrong with one that is damaged."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        return json.loads(file.read_text(encoding="utf-8")).get(name)
    return None


def _ids(tokenizer: HfTokenizer) -> dict[str, int]:
    return tokenizer.library_tokenizer(has_special_text=True).get_vocab()
