"""A data set on disk: what stands in the folder, opened strictly, checked byte by byte.

    dataset.json             what stands below, as JSON
    train-00000.tokens.npy   uint16 or uint32 [tokens]: documents one after the other
    train-00000.lengths.npy  int64 [documents]: tokens of each, BOS and EOD included
    train-00000.mask.npy     uint8 [tokens]: 1 where a token counts as a target, in
                             data sets where not all do
    held_out-00000. ...      the other split, where there is one

`dataset.json` holds `format_version`, `dtype`, `tokenizer` (its JSON),
`tokenizer_digest` and `splits`: for each split `tokens`, `documents`, `bytes` (UTF-8
bytes of its text) and `shards`, for each shard `file`, `checksum` (xxh3_128 of the
whole file), `lengths_file`, `lengths_checksum`, `tokens` and `documents`; in format 2,
which has masks, also `mask_file` and `mask_checksum`. Plain numpy reads all of it;
nothing is ever unpickled. `prepare` writes it.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import xxhash

from jaxinfra.config import DataError
from jaxinfra.data import tokenizer as tokenizers

FORMAT_VERSION = 1  # of a data set in which every token counts as a target
MASKED_VERSION = 2  # of one with masks
MANIFEST = "dataset.json"
AUTO_VERIFY_BYTES = 256 * 2**20  # below it, a check of every byte costs under 0.1 s

LENGTH_DTYPE = np.dtype("<i8")
MASK_DTYPE = np.dtype("u1")
_READ_BYTES = 4 * 2**20
_FILE_NAME = re.compile(r"[A-Za-z0-9_]+-[0-9]{5,}\.(tokens|lengths|mask)\.npy")
_MANIFEST_KEYS = {
    "format_version": int,
    "dtype": str,
    "tokenizer": dict,
    "tokenizer_digest": str,
    "splits": dict,
}
_SPLIT_KEYS = {"tokens": int, "documents": int, "bytes": int, "shards": list}
_SHARD_FILE_KEYS = ("file", "checksum", "lengths_file", "lengths_checksum")
_SHARD_KEYS = dict.fromkeys(_SHARD_FILE_KEYS, str) | {"tokens": int, "documents": int}
_MASK_KEYS = {"mask_file": str, "mask_checksum": str}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """Memory-mapped arrays and what `dataset.json` says of their files."""

    tokens: np.ndarray  # [N] ids
    lengths: np.ndarray  # [D] tokens of each document; they sum to N
    checksums: Mapping[pathlib.Path, str]
    mask: np.ndarray | None = None  # uint8 [N], None where every token counts

    def spans(self) -> Iterator[tuple[int, int]]:
        """[start, stop) of every document in the tokens."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        yield from zip(ends - self.lengths, ends, strict=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One half of a data set: what is trained on, or what is held out."""

    name: str
    digest: str  # of the data set, "/", the name
    dtype: np.dtype
    vocab_size: int
    num_tokens: int
    num_documents: int
    text_bytes: int  # of the text as UTF-8: what bits per byte divide by
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """An opened data set folder: its tokenizer, and its splits by name."""

    folder: pathlib.Path
    digest: str  # sha256 of dataset.json, and through its checksums of every byte
    tokenizer: tokenizers.Tokenizer
    splits: Mapping[str, Split]

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise DataError(
                f"{self.folder} has no split {name!r}, only {sorted(self.splits)}; "
                "prepare it again with held_out above 0"
            )
        return self.splits[name]


def open_dataset(
    folder: str | pathlib.Path, *, verify: bool | Literal["auto"] = "auto"
) -> Dataset:
    """Memory-maps a data set folder after checking all that `dataset.json` says of it.

    `verify` also checks every byte; "auto" does so below `AUTO_VERIFY_BYTES`. Raises
    DataError, naming the file.
    """
    folder = pathlib.Path(folder)
    where = folder / MANIFEST
    try:
        manifest = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where} cannot be read ({error}); name a folder that prepare wrote"
        ) from error
    _check_keys(manifest, _MANIFEST_KEYS, where)
    if (version := manifest["format_version"]) not in (FORMAT_VERSION, MASKED_VERSION):
        raise DataError(
            f"{where}: format_version {version} is not {FORMAT_VERSION} or "
            f"{MASKED_VERSION}, which this release reads; prepare it again or use the "
            "release that wrote it"
        )
    tokenizer = tokenizers.from_json(manifest["tokenizer"])
    _check_equal(where, "tokenizer_digest", manifest, tokenizer.digest())
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    _check_equal(where, "dtype", manifest, dtype.name)
    digest = tokenizers.json_sha256(manifest)
    splits = {}
    for name, record in manifest["splits"].items():
        _check_keys(record, _SPLIT_KEYS, f"{where}: split {name!r}")
        shards = tuple(
            _open_shard(folder, s, dtype, has_mask=version == MASKED_VERSION)
            for s in record["shards"]
        )
        for key in ("tokens", "documents"):
            total = sum(s[key] for s in record["shards"])
            _check_equal(f"{where}: split {name!r}", key, record, total)
        splits[name] = Split(
            name=name,
            digest=f"{digest}/{name}",
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            num_tokens=record["tokens"],
            num_documents=record["documents"],
            text_bytes=record["bytes"],
            shards=shards,
        )
    dataset = Dataset(folder=folder, digest=digest, tokenizer=tokenizer, splits=splits)
    is_small = _num_bytes(dataset) < AUTO_VERIFY_BYTES
    to_verify = is_small if verify == "auto" else verify
    if to_verify and (bad := verify_dataset(dataset)):
        raise DataError(f"{folder} is damaged: {'; '.join(bad)}; prepare it again")
    return dataset


def verify_dataset(dataset: Dataset) -> list[str]:
    """Reads every byte; one line for each bad file, none if all is well."""
    bad = []
    for split in dataset.splits.values():
        for shard in split.shards:
            for path, checksum in shard.checksums.items():
                if (found := file_xxh3_128(path)) != checksum:
                    bad.append(f"{path.name} has checksum {found}, not {checksum}")
            if shard.tokens.max() >= split.vocab_size:
                path = next(iter(shard.checksums))
                bad.append(f"{path.name} has ids above {split.vocab_size - 1}")
            if shard.mask is not None and shard.mask.max() > 1:
                path = [*shard.checksums][-1]
                bad.append(f"{path.name} has weights that are not 0 or 1")
    return bad


def file_sha256(path: pathlib.Path) -> str:
    """Hex sha256 of the bytes of a file: what names a text. Raises DataError."""
    return _file_hex(path, hashlib.sha256())


def file_xxh3_128(path: pathlib.Path) -> str:
    """Hex xxh3_128 of the bytes of a file: notices damage, at 16 GB/s a core. Raises
    DataError."""
    return _file_hex(path, xxhash.xxh3_128())


def _open_shard(
    folder: pathlib.Path, record: Any, dtype: np.dtype, *, has_mask: bool
) -> Shard:
    where = folder / MANIFEST
    keys = _SHARD_KEYS | (_MASK_KEYS if has_mask else {})
    _check_keys(record, keys, f"{where}: a shard")
    tokens_path = _inside(folder, record["file"])
    lengths_path = _inside(folder, record["lengths_file"])
    tokens = _open_array(tokens_path, dtype, record["tokens"])
    lengths = _open_array(lengths_path, LENGTH_DTYPE, record["documents"])
    if lengths.min() < 1 or lengths.sum() != record["tokens"]:
        raise DataError(
            f"{lengths_path}: document lengths must be 1 or more and sum to "
            f"{record['tokens']}, the tokens of {tokens_path.name}; prepare it again"
        )
    checksums = {tokens_path: record["checksum"]}
    checksums[lengths_path] = record["lengths_checksum"]
    if not has_mask:
        return Shard(tokens=tokens, lengths=lengths, checksums=checksums)
    mask_path = _inside(folder, record["mask_file"])
    mask = _open_array(mask_path, MASK_DTYPE, record["tokens"])
    checksums[mask_path] = record["mask_checksum"]
    return Shard(tokens=tokens, lengths=lengths, checksums=checksums, mask=mask)


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    if not _FILE_NAME.fullmatch(name):
        raise DataError(
            f"{folder / MANIFEST}: file name {name!r} must look like "
            "train-00000.tokens.npy, without any folder; prepare it again"
        )
    return folder / name


def _open_array(path: pathlib.Path, dtype: np.dtype, size: int) -> np.ndarray:
    """Memory-maps a .npy file that must hold exactly `size` items of `dtype`."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header raises anything, TokenError too
        raise DataError(f"{path} cannot be read ({error}); restore the file") from error
    is_whole = path.stat().st_size == array.offset + array.nbytes
    if array.dtype != dtype or array.shape != (size,) or size < 1 or not is_whole:
        raise DataError(
            f"{path} holds {array.dtype.name}{list(array.shape)} in "
            f"{path.stat().st_size} bytes; dataset.json says {dtype.name}[{size}]: "
            "restore the file or prepare it again"
        )
    return np.asarray(array)


def _num_bytes(dataset: Dataset) -> int:
    shards = [s for split in dataset.splits.values() for s in split.shards]
    return sum(s.tokens.nbytes + s.lengths.nbytes for s in shards)


def _check_keys(value: Any, keys: dict[str, type], where: Any) -> None:
    """Raises unless `value` is a dict of just these keys, its values of these types."""
    if not isinstance(value, dict) or value.keys() != keys.keys():
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{where} must hold exactly the keys {sorted(keys)}, not {found}; "
            "prepare it again"
        )
    for key, kind in keys.items():
        if type(value[key]) is not kind:  # bool is an int, but no number of tokens
            raise DataError(
                f"{where}: {key} must be {kind.__name__}, not {value[key]!r:.80}; "
                "prepare it again"
            )


def _check_equal(where: Any, key: str, record: dict[str, Any], rule: Any) -> None:
    if record[key] != rule:
        raise DataError(
            f"{where}: {key} is {record[key]!r}, but what it describes says {rule!r}; "
            "prepare it again"
        )


def _file_hex(path: pathlib.Path, state: Any) -> str:
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                state.update(piece)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; "
            "check the file, its permissions and its disk"
        ) from error
    return state.hexdigest()
