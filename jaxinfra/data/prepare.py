"""Text files to a data set folder: split, shuffle once, encode, write.

Which documents are held out, and the order of the others, follow from the texts and the
seed alone: the same input gives the same bytes on every machine. A folder is written
whole or not at all; `shards` says what stands in it. `chat` makes the documents of
conversations; both end in `writer`.
"""

import difflib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, assert_never

import numpy as np

import jaxinfra
from jaxinfra.config import DataError
from jaxinfra.data import shards, sources, windows, writer
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data.sources import Piece
from jaxinfra.data.tokenizer import BosRule

# Makes the tokenizer of a data set from the texts that are trained on.
MakeTokenizer = Callable[[Sequence[str]], tokenizers.Tokenizer]
SplitRule = Literal["documents", "tail"]

CORPORA = {"shakespeare": pathlib.Path(__file__).parent / "corpus" / "shakespeare.txt"}

_VERSION = 1  # of the way from text to bytes: part of the name of a cached data set


def prepare(
    inputs: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    *,
    tokenizer: str | MakeTokenizer,
    split: SplitRule,
    held_out: float,
    seed: int,
    eod: str = "",
    bos: BosRule = "tokenizer",
    shard_tokens: int = writer.SHARD_TOKENS,
    text_key: str = "text",
    document_separator: str | None = None,
    clean: Callable[[list[str]], list[str]] = lambda texts: texts,
) -> shards.Dataset:
    """Writes the data set `out` from text and JSONL files and opens it.

    `documents` holds out the fraction `held_out` of the distinct documents, at least
    one and not all, copies of a text on the same side. `tail` holds out the last
    `held_out` of the characters, and may cut one document in two. Train documents are
    shuffled by `seed`, held-out ones stay in order; after each end of a document stands
    the EOD id, and before it BOS where the tokenizer has one. tokenizer: byte, char
    (which knows the characters of both splits), a path and how its documents begin and
    end (`tokenizer_files`), or what makes one of the texts trained on. `clean` comes
    before the split. Raises DataError before anything is written.

    Limits: holds the text and the ids of the whole corpus in memory, one process.
    """
    check_options(split, held_out, seed, shard_tokens)
    own = isinstance(tokenizer, str) and _named_tokenizer(tokenizer, eod=eod, bos=bos)
    files = sources.find_files([CORPORA.get(str(path), path) for path in inputs])
    found = sources.read_documents(
        files, text_key=text_key, document_separator=document_separator
    )
    texts = clean(list(found))
    if not texts:
        raise DataError(
            f"{files[0]} and {len(files) - 1} more files hold no document with text; "
            "give files with text, or another document_separator"
        )
    documents = [Piece(text) for text in texts]
    match split:
        case "documents":
            parts = sources.split_documents(documents, held_out=held_out, seed=seed)
        case "tail":
            parts = sources.split_tail(documents, held_out=held_out)
        case _:
            assert_never(split)
    train, held = writer.shuffled(parts[0], seed=seed), parts[1]
    if isinstance(tokenizer, str):
        coder = own or tokenizers.CharTokenizer("".join(set().union(*texts)))
    else:
        coder = tokenizer([piece.text for piece in train])
    pieces = {"train": train, "held_out": held} if held else {"train": train}
    contents = {name: _encode(coder, split) for name, split in pieces.items()}
    return writer.write_dataset(
        pathlib.Path(out), tokenizer=coder, splits=contents, shard_tokens=shard_tokens
    )


def prepared(
    path_or_name: str | pathlib.Path,
    *,
    cache_dir: str | pathlib.Path,
    tokenizer: str,
    split: SplitRule,
    held_out: float,
    seed: int,
    eod: str = "",
    bos: BosRule = "tokenizer",
    shard_tokens: int = writer.SHARD_TOKENS,
    text_key: str = "text",
    document_separator: str | None = None,
) -> pathlib.Path:
    """The data set folder for `data.path`: itself, or made once in `cache_dir`.

    A folder with dataset.json is returned as it is, whatever the options say. Text (a
    file, folder, glob or shipped name) is prepared into `cache_dir`/<sha256 of the
    bytes and the options>, unless that is there; any number of processes may do so at
    once. Raises DataError, as `prepare` does. Limits: reads all the text to name the
    folder.
    """
    path = CORPORA.get(str(path_or_name), pathlib.Path(path_or_name).expanduser())
    if (path / shards.MANIFEST).is_file():
        return path
    if not path.exists() and not any(c in str(path_or_name) for c in "*?["):
        raise DataError(_not_found(path_or_name))
    files = sources.find_files([path])
    coder = _named_tokenizer(tokenizer, eod=eod, bos=bos)
    is_file = isinstance(coder, tokenizers.HfTokenizer)
    options: dict[str, Any] = {
        "tokenizer": coder.digest() if is_file else tokenizer,
        "split": split,
        "held_out": held_out,
        "seed": seed,
        "shard_tokens": shard_tokens,
        "text_key": text_key,
        "document_separator": document_separator,
    }
    inputs = [[file.suffix, windows.file_sha256(file)] for file in files]
    key = {"version": [_VERSION, shards.FORMAT_VERSION], "inputs": inputs, **options}
    folder = pathlib.Path(cache_dir) / tokenizers.json_sha256(key)
    if not (folder / shards.MANIFEST).is_file():
        options["tokenizer"] = (lambda texts: coder) if is_file else tokenizer
        prepare(files, folder, **options)
    return folder


def check_options(split: str, held_out: float, seed: int, shard_tokens: int) -> None:
    """Raises DataError for what no data set can be made with."""
    if split not in ("documents", "tail"):
        raise DataError(f"data.split={split!r} is not known; use documents or tail")
    if not 0 <= held_out < 1:
        raise DataError(
            f"data.held_out={held_out} must be at least 0 and below 1: it is the "
            "fraction that is not trained on"
        )
    if not 0 <= seed < 2**64:
        raise DataError(f"seed={seed} must be in 0 .. 2**64 - 1")
    if shard_tokens < 1:
        raise DataError(f"shard_tokens={shard_tokens} must be 1 or more")


def _named_tokenizer(
    name: str, *, eod: str, bos: BosRule
) -> tokenizers.Tokenizer | None:
    """The tokenizer of data.tokenizer; None for char, which is made of the texts."""
    if name in ("byte", "char"):
        if eod or bos != "tokenizer":
            raise DataError(
                f"data.eod and data.bos are for tokenizers from files, and data."
                f"tokenizer={name} has its own EOD and no BOS; leave them out"
            )
        return tokenizers.ByteTokenizer() if name == "byte" else None
    if not pathlib.Path(name).expanduser().exists():
        raise DataError(
            f"data.tokenizer={name!r} is not known: give byte, char, or a path that "
            "exists, of a Hugging Face folder, a tokenizer.json, a SentencePiece "
            ".model or a .tiktoken file"
        )
    # By its public name, which loads the module: a plain run needs none of it.
    return jaxinfra.load_tokenizer(name, eod=eod, bos=bos)


def _encode(
    tokenizer: tokenizers.Tokenizer, pieces: list[Piece]
) -> writer.SplitContent:
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    eod, none = np.array([tokenizer.eod_id], dtype), np.array([], dtype)
    bos = none if tokenizer.bos_id is None else np.array([tokenizer.bos_id], dtype)
    ids = tokenizer.encode_batch(piece.text for piece in pieces)
    documents = [
        np.concatenate([bos if p.is_start else none, i, eod if p.is_end else none])
        for p, i in zip(pieces, ids, strict=True)
    ]
    text_bytes = sum(len(piece.text.encode("utf-8")) for piece in pieces)
    return writer.SplitContent(documents=documents, text_bytes=text_bytes)


def _not_found(path: str | pathlib.Path) -> str:
    folder = pathlib.Path(path).parent
    beside = [str(p) for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(str(path), [*CORPORA, *beside], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"data.path={str(path)!r} does not exist; give a folder that prepare wrote, "
        f"{sources.ACCEPTED}, or a corpus that ships here ({', '.join(CORPORA)}){hint}"
    )
