"""The tokenizer that belongs to a model, wherever that comes from.

A run folder holds it as `tokenizer.json`, in our own form; a published folder in files
of its own; a GGUF file in its metadata.
"""

import json
import pathlib
import tempfile

from jaxinfra import runfolder
from jaxinfra.config import DataError
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data import tokenizer_files
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.interop import export, gguf_file, pretrained


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of the source at `path` (see `pretrained`).

    Raises DataError, which says what to do, where it has none.
    """
    place = pathlib.Path(path).expanduser()
    if place.suffix == ".gguf":
        with tempfile.TemporaryDirectory() as folder:
            for name, text in gguf_file.tokenizer_files(place).items():
                pathlib.Path(folder, name).write_text(text, encoding="utf-8")
            return tokenizer_files.load_tokenizer(folder)
    run, _ = pretrained.run_and_step(place)
    ours = run / runfolder.TOKENIZER
    if (run / runfolder.CHECKPOINTS).is_dir():
        if ours.is_file():
            return tokenizers.from_json(json.loads(ours.read_text(encoding="utf-8")))
        raise DataError(
            f"{run} has no {runfolder.TOKENIZER}; resume the run once, which writes it"
        )
    return tokenizer_files.load_tokenizer(run)


def files(path: str | pathlib.Path) -> dict[str, bytes]:
    """The files by which other libraries read the tokenizer of the source at `path`;
    none where it has none that they know."""
    place = pathlib.Path(path).expanduser()
    if place.suffix == ".gguf":
        made = gguf_file.tokenizer_files(place)
        return {name: text.encode() for name, text in made.items()}
    run, _ = pretrained.run_and_step(place)
    if not (run / runfolder.CHECKPOINTS).is_dir():
        return export.files_of(run)
    as_they_came = export.files_of(run / export.TOKENIZER_FOLDER)
    has_own = (run / runfolder.TOKENIZER).is_file()
    if as_they_came or not has_own:
        return as_they_came
    return export.tokenizer_files(open_tokenizer(str(run)))
