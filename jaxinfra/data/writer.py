"""A data set folder, written whole or not at all; `shards` says what stands in it.

`prepare` and `chat` make what is written.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data import fitting, folders, leftovers, order, shards, urls
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data.shards import Layout

SHARD_TOKENS = 2**27  # 256 MiB of uint16
_LAYOUT_EPOCH = 2**64 - 1  # the shuffle on disk is not the shuffle of any real epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitContent:
    """What a split is written from: the ids of its documents, in reading order.

    documents may be read from elsewhere when they are asked for, one by one or by a
    slice; lengths: tokens of each, int64 [D], None: they are asked. masks: one for each
    document, uint8 and 1 where a token counts as a target; None where all do. layout:
    what rows are laid out by, which may change the order.
    """

    documents: Sequence[np.ndarray]
    text_bytes: int
    lengths: np.ndarray | None = None
    masks: Sequence[np.ndarray] | None = None
    layout: Layout = shards.CONCAT


def laid_out(
    splits: Mapping[str, SplitContent], layout: Layout
) -> dict[str, SplitContent]:
    """The splits, the rows of train laid out so; what is held out can be read by rows
    of any length."""
    return dict(splits) | {"train": dataclasses.replace(splits["train"], layout=layout)}


def shuffled(documents: Sequence[Any], *, seed: int) -> list[Any]:
    """The documents in the order that they are laid on disk in."""
    return [documents[i] for i in shuffled_numbers(len(documents), seed=seed)]


def shuffled_numbers(count: int, *, seed: int) -> np.ndarray:
    """int64 [count]: the number of the document at each place of that order."""
    turns = order.permute(np.arange(count), size=count, seed=seed, epoch=_LAYOUT_EPOCH)
    return np.argsort(turns)


def make_way(out: str | pathlib.Path) -> None:
    """Removes what processes that were killed left of the data set `out`.

    Raises DataError for a folder that `write_dataset` cannot write, by its name.
    """
    fix = "write it to a folder, and upload that (aws s3 cp --recursive, hdfs dfs -put)"
    urls.check_local(out, key="out", fix=fix)
    folder = pathlib.Path(os.path.abspath(out))
    leftovers.remove_dead(folder.parent, folder.name)


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
    (`.NAME.*.tmp`, all that a killed process leaves behind, until `make_way` removes
    it), which is then renamed. A folder that is there already, or that another process
    renamed first, is kept if it is equal. Raises DataError if it is not, or if the disk
    refuses; refused after the rename, the folder stands all the same, and whole.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    temporary = leftovers.temporary(folder, leftovers.new_owner())
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
    manifest = {
        "format_version": shards.FORMAT_VERSION,
        "dtype": dtype.name,
        "tokenizer": tokenizer.to_json(),
        "tokenizer_digest": tokenizer.digest(),
        "splits": {
            name: _write_split(folder, name, content, dtype, shard_tokens)
            for name, content in splits.items()
        },
    }
    text = json.dumps(manifest, indent=1).encode() + b"\n"
    with (folder / shards.MANIFEST).open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _fsync(folder)
    return hashlib.sha256(text).hexdigest()


def _write_split(
    folder: pathlib.Path,
    name: str,
    content: SplitContent,
    dtype: np.dtype,
    shard_tokens: int,
) -> dict[str, Any]:
    """Writes the shards of a split; returns its record."""
    documents, masks, layout = content.documents, content.masks, content.layout
    lengths_D = content.lengths
    if lengths_D is None:
        lengths_D = np.fromiter(map(len, documents), np.int64, len(documents))
    plan = fitting.plan(lengths_D, name=layout.name, length=layout.length)
    records, starts, in_rows = [], [], [0]
    for number, units in enumerate(plan.cut(shard_tokens)):
        here, rows = plan.part(units)
        tokens = _joined([documents[d] for d in here], dtype)
        ends_D = np.cumsum(lengths_D[here])
        starts.append(_most_starts(ends_D))
        arrays = {
            "tokens": tokens,
            "lengths": lengths_D[here].astype(shards.LENGTH_DTYPE),
            "ends": ends_D.astype(shards.LENGTH_DTYPE),
        }
        if masks is not None:
            arrays["mask"] = _joined([masks[d] for d in here], shards.MASK_DTYPE)
        if rows is not None:
            arrays["rows"] = rows.astype(shards.ROWS_DTYPE)
            before, after = np.searchsorted(ends_D, [rows[:, 0] + 1, rows[:, 1]])
            in_rows.append(int((after - before).max(initial=0)))
        start, checksums, sums = f"{name}-{number:05d}", {}, []
        for kind, array in arrays.items():
            path = folder / f"{start}.{kind}.npy"
            _write_array(path, array)
            checksums[kind] = folders.file_xxh3_128(path)
            if kind in ("tokens", "mask"):
                sums.append(folders.block_sums(path))
        path = folder / f"{start}.sums.npy"
        _write_array(path, np.concatenate(sums).astype(shards.SUMS_DTYPE))
        checksums["sums"] = folders.file_xxh3_128(path)
        record = {
            "file": f"{start}.tokens.npy",
            "tokens": len(tokens),
            "documents": len(here),
            "checksum": checksums.pop("tokens"),
        }
        record |= {} if rows is None else {"rows": len(rows)}
        record |= {f"{kind}_checksum": value for kind, value in checksums.items()}
        records.append(record)
    return {
        "tokens": sum(s["tokens"] for s in records),
        "documents": sum(s["documents"] for s in records),
        "bytes": content.text_bytes,
        "has_mask": masks is not None,
        "layout": layout._replace(most_starts=max(in_rows))._asdict(),
        "most_starts": _most_of_all(starts),
        "shards": records,
    }


def _joined(documents: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(documents).astype(dtype, copy=False)


def _most_starts(ends_D: np.ndarray) -> list[int]:
    """Entry k: the most documents that begin in any 2**k consecutive tokens, for k up
    to all tokens of a shard; `ends_D` is the position after each document."""
    starts_D = np.concatenate([[0], ends_D[:-1]])
    counts = []
    for k in range(int(ends_D[-1] - 1).bit_length() + 1):
        stop_D = np.searchsorted(starts_D, starts_D + 2**k)
        counts.append(int((stop_D - np.arange(starts_D.size)).max()))
    return counts


def _most_of_all(counts: list[list[int]]) -> list[int]:
    """Entrywise the most of the lists of `_most_starts`, whose last entries go on."""
    longest = max(map(len, counts))
    return [max(c[min(k, len(c) - 1)] for c in counts) for k in range(longest)]


def _write_array(path: pathlib.Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


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
