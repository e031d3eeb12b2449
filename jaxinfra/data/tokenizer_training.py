"""A byte-pair tokenizer trained on a corpus, and tokenizers written to a folder."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxinfra.config import DataError
from jaxinfra.data.tokenizer_json import NEEDS_HF, HfTokenizer, parse_tokenizer_json

EOD = "<|endoftext|>"
_BYTES = 256
MAX_VOCAB_SIZE = 2**24  # far above any in use; the library panics at 10**12


def train_bpe(texts: Sequence[str], *, vocab_size: int) -> HfTokenizer:
    """Byte-level BPE with GPT-2's way of splitting text, of `vocab_size` ids.

    Ids are the 256 bytes, the merges in order, and at last EOD; fewer where the texts
    give no more pairs that stand in them twice. The same texts give the same tokenizer.
    Raises DataError if `vocab_size` is below 257 or above `MAX_VOCAB_SIZE`, or the
    extra hf is missing. Source: A. Radford et al., "Language Models are Unsupervised
    Multitask Learners", 2.2.
    """
    if not _BYTES < vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={vocab_size} must be {_BYTES + 1} or more, for every byte and "
            f"EOD, and {MAX_VOCAB_SIZE} at most"
        )
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(NEEDS_HF.format(what="training a tokenizer")) from error
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([EOD])
    size = made.get_vocab_size()
    return HfTokenizer(made.to_str(), vocab_size=size, eod_id=size - 1)


def published_files(tokenizer: HfTokenizer) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json as text."""
    made = parse_tokenizer_json(tokenizer.tokenizer_json, where="the tokenizer")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": made.id_to_token(tokenizer.eod_id),
        "add_bos_token": tokenizer.bos_id is not None,
    }
    if tokenizer.bos_id is not None:
        settings["bos_token"] = made.id_to_token(tokenizer.bos_id)
    return {
        "tokenizer.json": tokenizer.tokenizer_json,
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def save(tokenizer: HfTokenizer, folder: str | pathlib.Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which Hugging Face tools load.

    Raises DataError if the disk refuses.
    """
    folder = pathlib.Path(folder)
    for name, text in published_files(tokenizer).items():
        try:
            (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"cannot write {folder / name}: {error.strerror or error}; free the "
                "disk or choose another folder"
            ) from error
