"""What a source says of text beside its model: its tokenizer, where texts begin and
end, how long a row may be, how a conversation is written."""

import datetime
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfra.config import ModelConfig
from jaxinfra.data import chat_template, tokenizer_files
from jaxinfra.data.chat_template import ChatTemplate
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.data.tokenizer_json import HfTokenizer
from jaxinfra.interop import tokenizers_of


class SourceText(NamedTuple):
    """library: the `tokenizers.Tokenizer` of whole texts, names of special tokens
    included; None for tokenizers that are ours alone. named_bos_id: the BOS token that
    the source names, though its tokenizer may not write it. stop_ids: what ends a text
    that is generated. max_length: tokens a row that the model was made for, or a run
    trained with; 0: not known. chat: None where it was not asked for, or is none."""

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


def open_text(path: str, model: ModelConfig, *, has_chat: bool = False) -> SourceText:
    """The text side of the source at `path` (see `pretrained`), whose model is `model`.

    Raises DataError where it has no tokenizer, or one with more ids than the model.
    """
    tokenizer = tokenizers_of.open_tokenizer(path, model)
    library = None
    if isinstance(tokenizer, HfTokenizer):
        library = tokenizer.library_tokenizer(has_special_text=True)
    with tokenizers_of.folder(path) as folder:
        settings = tokenizer_files.settings_of(folder)
        chat = None
        if has_chat:
            today = datetime.date.today()
            chat = chat_template.load(tokenizer, folder=folder, date=today)
    bos = settings.get("bos_token")
    ends = [tokenizer.eod_id, *tokenizers_of.end_ids(path)]
    return SourceText(
        tokenizer=tokenizer,
        library=library,
        named_bos_id=library.token_to_id(bos) if library and bos else tokenizer.bos_id,
        stop_ids=tuple(dict.fromkeys(ends)),
        max_length=model.max_length,
        chat=chat,
    )
