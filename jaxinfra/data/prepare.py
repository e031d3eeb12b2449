"""Text files to a data set folder: split, shuffle once, encode, write.

Which documents are held out, and the order of the others, follow from the texts and the
seed alone: the same input gives the same bytes on every machine. A folder is written
whole or not at all; `shards` says what stands in it.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, assert_never

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data import order, shards, sources
from jaxinfra.data import tokenizer as tokenizers

TokenizerName = Literal["byte", "char"]
SplitRule = Literal["documents", "tail"]

SHARD_TOKENS = 2**27  # 256 MiB of uint16
CORPORA = {"shakespeare": pathlib.Path(__file__).parent / "corpus" / "shakespeare.txt"}

_VERSION = 1  # of the way from text to bytes: part of the name of a cached data set
_LAYOUT_EPOCH = 2**64 - 1  # the shuffle on disk is not the shuffle of any real epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitContent:
    """What a split is written from: the ids of its documents, in reading order."""

    documents: Sequence[np.ndarray]
    text_bytes: int


class _Piece(NamedTuple):
    """A document, or the part of one on one side of a `tail` cut."""

    text: str
    is_end: bool  # an EOD follows: the document ends here


def prepare(
    inputs: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    *,
    tokenizer: TokenizerName,
    split: SplitRule,
    held_out: float,
    seed: int,
    shard_tokens: int = SHARD_TOKENS,
    text_key: str = "text",
    document_separator: str | None = None,
) -> shards.Dataset:
    """Writes the data set `out` from text and JSONL files and opens it.

    `documents` holds out the fraction `held_out` of the distinct documents, at least
    one and not all, copies of a text on the same side. `tail` holds out the last
    `held_out` of the characters, and may cut one document in two. Train documents are
    shuffled by `seed`, held-out ones stay in order; after each end of a document stands
    the EOD id. A char tokenizer knows the characters of both splits. Raises DataError
    before anything is written.

    Limits: holds the text and the ids of the whole corpus in memory, one process.
    """
    _check_options(tokenizer, split, held_out, seed, shard_tokens)
    files = sources.find_files([CORPORA.get(str(path), path) for path in inputs])
    texts = list(
        sources.read_documents(
            files, text_key=text_key, document_separator=document_separator
        )
    )
    if not texts:
        raise DataError(
            f"{files[0]} and {len(files) - 1} more files hold no document with text; "
            "give files with text, or another document_separator"
        )
    match split:
        case "documents":
            train, held = _split_documents(texts, held_out=held_out, seed=seed)
        case "tail":
            train, held = _split_tail(texts, held_out=held_out)
        case _:
            assert_never(split)
    turns = order.permute(
        np.arange(len(train)), size=len(train), seed=seed, epoch=_LAYOUT_EPOCH
    )
    pieces = {"train": [train[i] for i in np.argsort(turns)]}
    if held:
        pieces["held_out"] = held
    coder = _make_tokenizer(tokenizer, texts)
    contents = {name: _encode(coder, split) for name, split in pieces.items()}
    return write_dataset(
        pathlib.Path(out), tokenizer=coder, splits=contents, shard_tokens=shard_tokens
    )


def prepared(
    path_or_name: str | pathlib.Path,
    *,
    cache_dir: str | pathlib.Path,
    tokenizer: TokenizerName,
    split: SplitRule,
    held_out: float,
    seed: int,
    shard_tokens: int = SHARD_TOKENS,
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
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "split": split,
        "held_out": held_out,
        "seed": seed,
        "shard_tokens": shard_tokens,
        "text_key": text_key,
        "document_separator": document_separator,
    }
    inputs = [[file.suffix, shards.file_sha256(file)] for file in files]
    key = {"version": [_VERSION, shards.FORMAT_VERSION], "inputs": inputs, **options}
    folder = pathlib.Path(cache_dir) / tokenizers.json_sha256(key)
    if not (folder / shards.MANIFEST).is_file():
        prepare(files, folder, **options)
    return folder


def write_dataset(
    folder: pathlib.Path,
    *,
    tokenizer: tokenizers.Tokenizer,
    splits: Mapping[str, SplitContent],
    shard_tokens: int,
) -> shards.Dataset:
    """Writes a data set folder, or leaves nothing under its name.

    A shard holds whole documents, together at most `shard_tokens` tokens unless one
    document alone is longer. Everything is written and fsynced in a sibling folder
    (`.NAME.*.tmp`, all that a killed process leaves behind), which is then renamed. A
    folder that is there already, or that another process renamed first, is kept if it
    is equal. Raises DataError if it is not, or if the disk refuses; refused after the
    rename, the folder stands all the same, and whole.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        digest = _write_files(temporary, tokenizer, splits, shard_tokens)
        _rename_or_accept(temporary, folder, digest)
        _fsync(folder.parent)
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error.strerror or error}; "
            "free the disk or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return shards.open_dataset(folder, verify=False)


def _check_options(
    tokenizer: str, split: str, held_out: float, seed: int, shard_tokens: int
) -> None:
    for key, value, names in (
        ("tokenizer", tokenizer, ("byte", "char")),
        ("split", split, ("documents", "tail")),
    ):
        if value not in names:
            raise DataError(f"data.{key}={value!r} is not known; use one of {names}")
    if not 0 <= held_out < 1:
        raise DataError(
            f"data.held_out={held_out} must be at least 0 and below 1: it is the "
            "fraction that is not trained on"
        )
    if not 0 <= seed < 2**64:
        raise DataError(f"seed={seed} must be in 0 .. 2**64 - 1")
    if shard_tokens < 1:
        raise DataError(f"shard_tokens={shard_tokens} must be 1 or more")


def _split_documents(
    texts: list[str], *, held_out: float, seed: int
) -> tuple[list[_Piece], list[_Piece]]:
    """Holds out the distinct texts with the smallest hashes of (seed, text)."""
    pieces = [_Piece(text, True) for text in texts]
    if held_out == 0:
        return pieces, []
    keys = [hashlib.sha256(f"{seed}:{text}".encode()).digest() for text in texts]
    ranked = sorted(set(keys))
    if len(ranked) < 2:
        raise DataError(
            f"data.split=documents needs at least 2 distinct documents to hold one out "
            f"and has {len(ranked)}; use data.split=tail, or data.held_out=0"
        )
    number = min(max(round(held_out * len(ranked)), 1), len(ranked) - 1)
    chosen = set(ranked[:number])
    train = [p for p, key in zip(pieces, keys, strict=True) if key not in chosen]
    held = [p for p, key in zip(pieces, keys, strict=True) if key in chosen]
    return train, held


def _split_tail(
    texts: list[str], *, held_out: float
) -> tuple[list[_Piece], list[_Piece]]:
    """Cuts the corpus, read as one text, before its last `held_out` characters."""
    total = sum(len(text) for text in texts)
    if held_out == 0:
        return [_Piece(text, True) for text in texts], []
    if total < 2:
        raise DataError(
            f"data.split=tail needs at least 2 characters and has {total}; "
            "give more text, or data.held_out=0"
        )
    left = total - min(max(round(held_out * total), 1), total - 1)
    train, held = [], []
    for text in texts:
        before, after = text[:left], text[left:]
        if before:
            train.append(_Piece(before, is_end=not after))
        if after:
            held.append(_Piece(after, is_end=True))
        left -= len(before)
    return train, held


def _make_tokenizer(name: TokenizerName, texts: list[str]) -> tokenizers.Tokenizer:
    match name:
        case "byte":
            return tokenizers.ByteTokenizer()
        case "char":
            return tokenizers.CharTokenizer("".join(set().union(*texts)))
        case _:
            assert_never(name)


def _encode(tokenizer: tokenizers.Tokenizer, pieces: list[_Piece]) -> SplitContent:
    eod = np.array([tokenizer.eod_id], tokenizers.id_dtype(tokenizer.vocab_size))
    documents, text_bytes = [], 0
    for text, is_end in pieces:
        ids = tokenizer.encode(text)
        documents.append(np.concatenate([ids, eod]) if is_end else ids)
        text_bytes += len(text.encode("utf-8"))
    return SplitContent(documents=documents, text_bytes=text_bytes)


def _not_found(path: str | pathlib.Path) -> str:
    folder = pathlib.Path(path).parent
    beside = [str(p) for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(str(path), [*CORPORA, *beside], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"data.path={str(path)!r} does not exist; give a folder that prepare wrote, "
        f"{sources.ACCEPTED}, or a corpus that ships here ({', '.join(CORPORA)}){hint}"
    )


def _write_files(
    folder: pathlib.Path,
    tokenizer: tokenizers.Tokenizer,
    splits: Mapping[str, SplitContent],
    shard_tokens: int,
) -> str:
    """Writes all files of a data set, `dataset.json` last; returns its digest."""
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    records = {}
    for name, content in splits.items():
        files = []
        for number, documents in enumerate(_grouped(content.documents, shard_tokens)):
            tokens = np.concatenate(documents).astype(dtype)
            lengths = np.array([len(d) for d in documents], shards.LENGTH_DTYPE)
            file = f"{name}-{number:05d}.tokens.npy"
            lengths_file = f"{name}-{number:05d}.lengths.npy"
            files.append(
                {
                    "file": file,
                    "checksum": _write_array(folder / file, tokens),
                    "lengths_file": lengths_file,
                    "lengths_checksum": _write_array(folder / lengths_file, lengths),
                    "tokens": len(tokens),
                    "documents": len(lengths),
                }
            )
        records[name] = {
            "tokens": sum(s["tokens"] for s in files),
            "documents": sum(s["documents"] for s in files),
            "bytes": content.text_bytes,
            "shards": files,
        }
    manifest = {
        "format_version": shards.FORMAT_VERSION,
        "dtype": dtype.name,
        "tokenizer": tokenizer.to_json(),
        "tokenizer_digest": tokenizer.digest(),
        "splits": records,
    }
    with (folder / shards.MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    _fsync(folder)
    return tokenizers.json_sha256(manifest)


def _grouped(
    documents: Sequence[np.ndarray], shard_tokens: int
) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    tokens = 0
    for document in documents:
        if group and tokens + len(document) > shard_tokens:
            yield group
            group, tokens = [], 0
        group.append(document)
        tokens += len(document)
    if group:
        yield group


def _write_array(path: pathlib.Path, array: np.ndarray) -> str:
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return shards.file_xxh3_128(path)


def _rename_or_accept(
    temporary: pathlib.Path, folder: pathlib.Path, digest: str
) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        if not (folder / shards.MANIFEST).exists():
            raise DataError(
                f"{folder} is there already and holds no data set; choose a folder "
                "that does not exist yet"
            ) from None
        if shards.open_dataset(folder, verify=True).digest != digest:
            raise DataError(
                f"{folder} holds another data set; a data set is never overwritten: "
                "delete the folder or choose another one"
            ) from None


def _fsync(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
