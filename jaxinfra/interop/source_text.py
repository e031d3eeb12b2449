"""What a source says of text beside its model: its tokenizer, where texts begin and
end, how long a row may be, how a conversation is written."""

import datetime
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfra import options, runfolder
from jaxinfra.data import chat_template, tokenizer_files
from jaxinfra.data.chat_template import ChatTemplate
from jaxinfra.data.tokenizer import HfTokenizer, Tokenizer
from jaxinfra.interop import pretrained, tokenizers_of

# The tokens that a published model takes, by fields of its config.json.
_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")


class SourceText(NamedTuple):
    """library: the `tokenizers.Tokenizer` of whole texts, names of special tokens
    included; None for tokenizers that are ours alone. named_bos_id: the BOS token that
    the source names, though its tokenizer may not write it. stop_ids: what ends a text
    that is generated. max_length: tokens a row that the model was made for, or a run
    trained with; 0: not known."""

    tokenizer: Tokenizer
    library: Any
    named_bos_id: int | None
    stop_ids: tuple[int, ...]
    max_length: int
    chat: ChatTemplate | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which names of special tokens are those tokens."""
        if self.library is None:
            return self.tokenizer.encode(text).tolist()
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids, special tokens left out."""
        if self.library is None:
            return self.tokenizer.decode(np.asarray(ids))
        return self.library.decode(np.asarray(ids).tolist(), skip_special_tokens=True)


def open_text(path: str) -> SourceText:
    """The text side of the source at `path` (see `pretrained`).

    Raises DataError where it has no tokenizer.
    """
    tokenizer = tokenizers_of.open_tokenizer(path)
    library = None
    if isinstance(tokenizer, HfTokenizer):
        library = tokenizer.library_tokenizer(has_special_text=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in tokenizers_of.files(path).items():
            pathlib.Path(folder, name).write_bytes(data)
        settings = tokenizer_files.settings_of(folder)
        today = datetime.date.today()
        chat = chat_template.load(tokenizer, folder=folder, date=today)
    bos = settings.get("bos_token")
    run, _ = pretrained.run_and_step(pathlib.Path(path).expanduser())
    fields = _fields(run / "config.json")
    ends = _fields(run / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return SourceText(
        tokenizer=tokenizer,
        library=library,
        named_bos_id=library.token_to_id(bos) if library and bos else tokenizer.bos_id,
        stop_ids=tuple(dict.fromkeys([tokenizer.eod_id, *ends])),
        max_length=_max_length(run, fields),
        chat=chat,
    )


def _max_length(place: pathlib.Path, fields: dict[str, Any]) -> int:
    if (place / runfolder.CHECKPOINTS).is_dir():
        config = options.from_json(fields, fill=True)
        return config.model.max_length or config.train.length
    return next((fields[name] for name in _LENGTHS if fields.get(name)), 0)


def _fields(file: pathlib.Path) -> dict[str, Any]:
    """Of a JSON file that may not be there; `pretrained` has said what is wrong."""
    if not file.is_file():
        return {}
    fields = json.loads(file.read_text(encoding="utf-8"))
    return fields if isinstance(fields, dict) else {}
