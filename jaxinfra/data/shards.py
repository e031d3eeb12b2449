"""A data set on disk: what stands in the folder, opened strictly, checked byte by byte.

    dataset.json             what stands below, as JSON
    train-00000.tokens.npy   uint16 or uint32 [tokens]: documents one after the other
    train-00000.lengths.npy  int64 [documents]: tokens of each, BOS and EOD included
    train-00000.ends.npy     int64 [documents]: position after each, summed for speed
    train-00000.sums.npy     uint64 [blocks]: xxh3 of every MiB of the tokens' file,
                             then of the mask's; bytes are checked as they are read
    train-00000.mask.npy     uint8 [tokens]: 1 where a token counts as a target, in
                             data sets where not all do
    train-00000.rows.npy     int64 [rows, 2]: where rows begin and end in the tokens, in
                             data sets laid out for one row length (`fitting`)
    held_out-00000. ...      the other split, where there is one

`dataset.json` holds `format_version`, `dtype`, `tokenizer` (its JSON),
`tokenizer_digest` and `splits`: for each split `tokens`, `documents`, `bytes` (UTF-8
bytes of its text), `has_mask`, `layout` (its `name`, the `length` of rows that it is
for, 0 for any, and how many documents begin in one at most), `most_starts` (entry k:
how many begin in any 2**k tokens at most) and `shards`, for each shard `file`,
`tokens`, `documents`, `rows` where laid out, and the xxh3_128 of whole files:
`checksum` of the tokens, `lengths_checksum`, `ends_checksum`, `sums_checksum`,
`mask_checksum`, `rows_checksum`. Nothing is ever unpickled. `writer` writes it.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data import folders
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data.folders import Folder, LocalFolder
from jaxinfra.data.records import check_equal, check_keys
from jaxinfra.data.windows import Report, Windows

FORMAT_VERSION = 3
MANIFEST = "dataset.json"
OPEN_THREADS = 16
AUTO_VERIFY_BYTES = 256 * 2**20  # below it, a check of every byte costs under 0.1 s

LENGTH_DTYPE = ROWS_DTYPE = np.dtype("<i8")
MASK_DTYPE = np.dtype("u1")
SUMS_DTYPE = np.dtype("<u8")
_MANIFEST_KEYS = {
    "format_version": int,
    "dtype": str,
    "tokenizer": dict,
    "tokenizer_digest": str,
    "splits": dict,
}
_SPLIT_KEYS = {
    "tokens": int,
    "documents": int,
    "bytes": int,
    "has_mask": bool,
    "layout": dict,
    "most_starts": list,
    "shards": list,
}
_LAYOUT_KEYS = {"name": str, "length": int, "most_starts": int}
_SHARD_KEYS = {"file": str, "tokens": int, "documents": int, "checksum": str}
_SHARD_KEYS |= dict.fromkeys(
    ("lengths_checksum", "ends_checksum", "sums_checksum"), str
)


class Layout(NamedTuple):
    """By what, and for rows of how many tokens, a split was laid out (`fitting`)."""

    name: str = "concat"
    length: int = 0  # any
    most_starts: int = 0  # documents that begin in a row after its first token


CONCAT = Layout()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """The arrays of a shard, and what `dataset.json` says of their files."""

    arrays: tuple[Windows, ...]  # [N] ids, and weights where not every token counts
    ends_D: np.ndarray  # int64 [D] position just after each document; the last is N
    checksums: Mapping[str, str]  # by the name of the file
    rows: np.ndarray | None = None  # int64 [R, 2], None where not laid out

    @property
    def tokens_size(self) -> int:
        return self.arrays[0].size

    @property
    def tokens(self) -> np.ndarray:
        """All ids [N]."""
        return self.arrays[0].whole()

    @property
    def mask(self) -> np.ndarray | None:
        """All weights, uint8 [N]; None where every token counts."""
        return self.arrays[1].whole() if len(self.arrays) > 1 else None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [D]."""
        return np.diff(self.ends_D, prepend=0)

    def spans(self) -> Iterator[tuple[int, int]]:
        """[start, stop) of every document in the tokens."""
        yield from zip(self.ends_D - self.lengths, self.ends_D, strict=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One half of a data set: what is trained on, or what is held out."""

    name: str
    digest: str  # of the data set, "/", the name
    folder: str
    is_remote: bool = False
    tokenizer_digest: str = ""
    dtype: np.dtype
    vocab_size: int
    num_tokens: int
    num_documents: int
    text_bytes: int  # of the text as UTF-8: what bits per byte divide by
    has_mask: bool
    layout: Layout
    shards: Sequence[Shard]
    tokens_S: np.ndarray  # int64 [S] tokens of each shard
    rows_S: np.ndarray  # int64 [S] rows of each shard, 0 where not laid out
    starts_K: np.ndarray  # entry k: the most documents that begin in 2**k tokens
    checksums: Callable[[], Iterable[dict[str, str]]] = tuple  # of each shard's files

    def open_together(self, numbers: Iterable[int]) -> None:
        """Opens shards by number, several at once: each waits for a server."""
        with concurrent.futures.ThreadPoolExecutor(OPEN_THREADS) as pool:
            collections.deque(pool.map(self.shards.__getitem__, numbers), maxlen=0)

    def most_starts(self, length: int) -> int:
        """A bound on the documents that begin among any `length` tokens."""
        k = min((length - 1).bit_length(), len(self.starts_K) - 1)
        return min(int(self.starts_K[k]), length)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """An opened data set folder: its tokenizer, and its splits by name."""

    files: Folder
    digest: str  # sha256 of dataset.json, and through its checksums of every byte
    tokenizer: tokenizers.Tokenizer
    splits: Mapping[str, Split]
    damage: list[str]  # lines on what was found damaged since the last look

    @property
    def folder(self) -> Any:
        """A pathlib.Path, or the text of a URL without what is secret."""
        return self.files.path

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise DataError(
                f"{self.folder} has no split {name!r}, only {sorted(self.splits)}; "
                "prepare it again with held_out above 0"
            )
        return self.splits[name]


def open_dataset(
    folder: str | pathlib.Path | Folder,
    *,
    verify: bool | Literal["auto"] = "auto",
    damaged: Literal["stop", "quarantine"] = "stop",
) -> Dataset:
    """Opens a data set, a path or a URL, checking all that `dataset.json` says of it.

    Bytes of tokens are checked when they are first read: `damaged` stop makes of damage
    a DataError; quarantine a line in `Dataset.damage`, and padding of its rows.
    `verify` checks every byte now; "auto" does so below `AUTO_VERIFY_BYTES`, unless
    damage goes to quarantine or the folder is a URL. Of more shards than
    `Folder.eager_shards` the files are opened, and missed, when they are first used.
    Raises DataError, naming the file.
    """
    opened = folders.as_folder(folder)
    where = f"{opened}/{MANIFEST}"
    try:
        text = opened.read(MANIFEST)
        manifest = json.loads(text)
    except DataError:  # of a server
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where} cannot be read ({error}); name a folder that prepare wrote"
        ) from error
    check_keys(manifest, _MANIFEST_KEYS, where)
    if (version := manifest["format_version"]) != FORMAT_VERSION:
        raise DataError(
            f"{where}: format_version {version} is not {FORMAT_VERSION}, which this "
            "release reads; prepare it again or use the release that wrote it"
        )
    tokenizer = tokenizers.from_json(manifest["tokenizer"])
    check_equal(where, "tokenizer_digest", manifest, tokenizer.digest())
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    check_equal(where, "dtype", manifest, dtype.name)
    digest = hashlib.sha256(text).hexdigest()
    damage: list[str] = []
    report = damage.append if damaged == "quarantine" else None
    splits = {}
    for name, record in manifest["splits"].items():
        splits[name] = _open_split(
            opened,
            name,
            record,
            digest=f"{digest}/{name}",
            dtype=dtype,
            tokenizer=tokenizer,
            report=report,
        )
    dataset = Dataset(
        files=opened, digest=digest, tokenizer=tokenizer, splits=splits, damage=damage
    )
    if verify == "auto":
        sizes = [s.num_tokens * s.dtype.itemsize for s in splits.values()]
        is_here = isinstance(opened, LocalFolder)
        verify = sum(sizes) < AUTO_VERIFY_BYTES and report is None and is_here
    if verify and (bad := verify_dataset(dataset)):
        raise DataError(f"{folder} is damaged: {'; '.join(bad)}; prepare it again")
    return dataset


def verify_dataset(dataset: Dataset) -> list[str]:
    """Reads every byte; one line for each bad file, none if all is well."""
    bad = []
    for split in dataset.splits.values():
        for number, checksums in enumerate(split.checksums()):
            found = [_damage(n, sum_, dataset.files) for n, sum_ in checksums.items()]
            bad += filter(None, found)
            if not any(found):
                bad += _wrong_in(split, number, dataset.files)
    return bad


def _damage(name: str, checksum: str, files: Folder) -> str:
    try:
        found = files.checksum(name)
    except (OSError, DataError) as error:
        return f"{name} cannot be read ({error})"
    return "" if found == checksum else f"{name} has checksum {found}, not {checksum}"


def _wrong_in(split: Split, number: int, files: Folder) -> list[str]:
    """What is wrong in a shard whose files are as they were written."""
    try:
        shard = split.shards[number]
        told = {name: _wrong(name, split, shard, files) for name in shard.checksums}
    except DataError as error:
        return [str(error)]
    return [f"{name} has {wrong}" for name, wrong in told.items() if wrong]


def _wrong(name: str, split: Split, shard: Shard, files: Folder) -> str:
    """What a file holds, its bytes as they were written, that it must not."""
    match name.split(".")[1]:
        case "tokens" if shard.tokens.max() >= split.vocab_size:
            return f"ids above {split.vocab_size - 1}"
        case "mask" if shard.mask is not None and shard.mask.max() > 1:
            return "weights that are not 0 or 1"
        case "lengths":
            shape, checksum = shard.ends_D.shape, shard.checksums[name]
            lengths = files.array(name, LENGTH_DTYPE, shape, checksum)
            is_equal = np.array_equal(lengths, shard.lengths)
            return "" if is_equal else "other lengths than its ends"
    return ""


class _Shards(collections.abc.Sequence):
    """Shards that are opened when they are asked for; some stay open."""

    def __init__(self, count: int, open_shard: Any, num_open: int):
        self._count = count
        self._open = functools.lru_cache(maxsize=num_open)(open_shard)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Shard:
        if not 0 <= number < self._count:  # ends iteration, too
            raise IndexError(number)
        return self._open(number)


def _open_split(
    folder: Folder,
    name: str,
    record: dict[str, Any],
    *,
    digest: str,
    dtype: np.dtype,
    tokenizer: tokenizers.Tokenizer,
    report: Report | None,
) -> Split:
    where = f"{folder}/{MANIFEST}: split {name!r}"
    check_keys(record, _SPLIT_KEYS, where)
    check_keys(record["layout"], _LAYOUT_KEYS, f"{where}: layout")
    layout = Layout(**record["layout"])
    keys = _SHARD_KEYS | ({"mask_checksum": str} if record["has_mask"] else {})
    keys |= {"rows": int, "rows_checksum": str} if layout.length else {}
    for number, shard in enumerate(record["shards"]):
        check_keys(shard, keys, f"{folder}/{MANIFEST}: a shard")
        is_name = name.isidentifier() and name.isascii()  # and no path
        is_next = is_name and shard["file"] == f"{name}-{number:05d}.tokens.npy"
        if not is_next or shard["tokens"] < 1 or shard["documents"] < 1:
            raise DataError(
                f"{where}: file name {shard['file']!r} must be like "
                "train-00000.tokens.npy and count up, the file not empty; prepare it "
                "again"
            )
    for key in ("tokens", "documents"):
        total = sum(shard[key] for shard in record["shards"])
        check_equal(where, key, record, total)
    open_shard = functools.partial(
        _open_shard, folder, record["shards"], dtype=dtype, report=report
    )
    shards: Sequence[Shard] = _Shards(
        len(record["shards"]), open_shard, folder.open_shards
    )
    if len(shards) <= folder.eager_shards:
        shards = tuple(shards)
    starts = record["most_starts"]
    if not starts or not all(type(n) is int and 0 < n < 2**63 for n in starts):
        raise DataError(f"{where}: most_starts must be numbers from 1; prepare it anew")
    return Split(
        name=name,
        digest=digest,
        folder=str(folder),
        is_remote=not isinstance(folder, LocalFolder),
        tokenizer_digest=tokenizer.digest(),
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        num_tokens=record["tokens"],
        num_documents=record["documents"],
        text_bytes=record["bytes"],
        has_mask=record["has_mask"],
        layout=layout,
        shards=shards,
        tokens_S=np.array([s["tokens"] for s in record["shards"]], np.int64),
        rows_S=np.array([s.get("rows", 0) for s in record["shards"]], np.int64),
        starts_K=np.array(starts, np.int64),
        checksums=lambda: map(_checksums, record["shards"]),
    )


def _open_shard(
    folder: Folder,
    records: Sequence[dict[str, Any]],
    number: int,
    *,
    dtype: np.dtype,
    report: Report | None,
) -> Shard:
    record = records[number]
    checksums = _checksums(record)
    names = {name.split(".")[1]: name for name in checksums}

    def read(kind: str, dtype: np.dtype, *shape: int) -> np.ndarray:
        return folder.array(names[kind], dtype, shape, checksums[names[kind]])

    kinds = {"tokens": dtype} | ({"mask": MASK_DTYPE} if "mask" in names else {})
    counts = [folders.num_blocks(dtype, record["tokens"]) for dtype in kinds.values()]
    sums = np.split(read("sums", SUMS_DTYPE, sum(counts)), np.cumsum(counts)[:-1])
    ends_D = read("ends", LENGTH_DTYPE, record["documents"])
    if ends_D[-1] != record["tokens"]:
        raise DataError(
            f"{names['ends']} of {folder} ends at {ends_D[-1]}, and {record['file']} "
            f"has {record['tokens']} tokens; prepare it again"
        )
    arrays = tuple(
        folder.windows(names[kind], dtype, record["tokens"], of_file, report)
        for (kind, dtype), of_file in zip(kinds.items(), sums, strict=True)
    )
    has_rows = "rows" in names
    rows = read("rows", ROWS_DTYPE, record["rows"], 2) if has_rows else None
    return Shard(arrays=arrays, ends_D=ends_D, checksums=checksums, rows=rows)


def _checksums(record: dict[str, Any]) -> dict[str, str]:
    """Of the files of a shard, by name."""
    of_kinds = {
        record["file"].replace(".tokens.", f".{key.removesuffix('_checksum')}."): value
        for key, value in record.items()
        if key.endswith("_checksum")
    }
    return {record["file"]: record["checksum"], **of_kinds}
