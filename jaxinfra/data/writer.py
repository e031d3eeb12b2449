"""A data set folder, written whole or not at all; `shards` says what stands in it.

`prepare` and `chat` make what is written.
"""

import dataclasses
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data import order, shards
from jaxinfra.data import tokenizer as tokenizers

SHARD_TOKENS = 2**27  # 256 MiB of uint16
_LAYOUT_EPOCH = 2**64 - 1  # the shuffle on disk is not the shuffle of any real epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitContent:
    """What a split is written from: the ids of its documents, in reading order.

    masks: one for each document, uint8 and 1 where a token counts as a target; None
    where all do, and in all splits alike.
    """

    documents: Sequence[np.ndarray]
    text_bytes: int
    masks: Sequence[np.ndarray] | None = None


def shuffled(documents: Sequence[Any], *, seed: int) -> list[Any]:
    """The documents in the order that they are laid on disk in."""
    count = len(documents)
    turns = order.permute(np.arange(count), size=count, seed=seed, epoch=_LAYOUT_EPOCH)
    return [documents[i] for i in np.argsort(turns)]


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
        for number, here in enumerate(_grouped(content.documents, shard_tokens)):
            group = content.documents[here]
            tokens = np.concatenate(group).astype(dtype)
            lengths = np.array([len(d) for d in group], shards.LENGTH_DTYPE)
            start = f"{name}-{number:05d}"
            file, lengths_file = f"{start}.tokens.npy", f"{start}.lengths.npy"
            record = {
                "file": file,
                "checksum": _write_array(folder / file, tokens),
                "lengths_file": lengths_file,
                "lengths_checksum": _write_array(folder / lengths_file, lengths),
                "tokens": len(tokens),
                "documents": len(lengths),
            }
            if content.masks is not None:
                mask = np.concatenate(content.masks[here]).astype(shards.MASK_DTYPE)
                record["mask_file"] = f"{start}.mask.npy"
                written = _write_array(folder / record["mask_file"], mask)
                record["mask_checksum"] = written
            files.append(record)
        records[name] = {
            "tokens": sum(s["tokens"] for s in files),
            "documents": sum(s["documents"] for s in files),
            "bytes": content.text_bytes,
            "shards": files,
        }
    has_masks = any(content.masks is not None for content in splits.values())
    manifest = {
        "format_version": shards.MASKED_VERSION if has_masks else shards.FORMAT_VERSION,
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


def _grouped(documents: Sequence[np.ndarray], shard_tokens: int) -> Iterator[slice]:
    """The documents of each shard."""
    start = tokens = 0
    for stop, document in enumerate(documents):
        if stop > start and tokens + len(document) > shard_tokens:
            yield slice(start, stop)
            start, tokens = stop, 0
        tokens += len(document)
    if start < len(documents):
        yield slice(start, len(documents))


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
