"""Ids from the indexed data sets of Megatron-LM: NAME.bin beside NAME.idx.

The index is little-endian, in this order:

    9 bytes            b"MMIDIDX\\x00\\x00"
    uint64             version, 1
    uint8              type of the ids in the .bin: `DTYPES`
    uint64, uint64     S sequences; E = documents + 1
    int32 [S]          ids of each sequence
    int64 [S]          where in the .bin each begins, in bytes: where the last one ends
    int64 [E]          sequences before each document, and at last S
    int8 [S]           modes, in data sets of more than text; not read

Source: megatron/core/datasets/indexed_dataset.py of NVIDIA Megatron-LM.
"""

import dataclasses
import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data import prepare, shards, splits, urls, writer
from jaxinfra.data import tokenizer as tokenizers

SUFFIXES = (".bin", ".idx")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6, 7: floats
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 2**24  # ids checked at a time


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Indexed:
    """Documents of ids as they stand in a NAME.bin, memory-mapped."""

    file: pathlib.Path
    ids: np.ndarray  # [N], one of `DTYPES`
    ends_E: np.ndarray  # int64: ids before each document, and at last N

    def __len__(self) -> int:
        return len(self.ends_E) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.ids[self.ends_E[number] : self.ends_E[number + 1]]


def open_indexed(path: str | pathlib.Path) -> Indexed:
    """The data set of which `path` is the .bin or the .idx.

    Raises DataError, naming the file, for one that is missing, cut off, longer than it
    says or of another format, and for an index that points elsewhere than the .bin has
    its sequences.
    """
    urls.check_local(path, key="source", fix="copy the .bin and the .idx here first")
    index, data = (
        pathlib.Path(path).with_suffix(suffix) for suffix in (".idx", ".bin")
    )
    try:
        whole = index.read_bytes()
        num_bytes = data.stat().st_size
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror or error}; a Megatron "
            "data set is NAME.bin and NAME.idx, side by side"
        ) from error
    if len(whole) < _HEADER.size:
        raise _bad(index, f"it has {len(whole)} bytes, fewer than a header")
    magic, version, code, num_sequences, num_ends = _HEADER.unpack_from(whole)
    if magic != _MAGIC or version != 1:
        raise _bad(index, f"it begins with {magic!r}, version {version}")
    if code not in DTYPES:
        raise _bad(index, f"its ids are of type {code}, none of {sorted(DTYPES)}")
    size = _HEADER.size + 12 * num_sequences + 8 * num_ends
    if len(whole) not in (size, size + num_sequences):
        raise _bad(
            index, f"it has {len(whole)} bytes, and {size} by the counts in its header"
        )
    dtype = np.dtype(DTYPES[code])
    place = _HEADER.size
    lengths_S = np.frombuffer(whole, "<i4", num_sequences, place).astype(np.int64)
    place += 4 * num_sequences
    pointers_S = np.frombuffer(whole, "<i8", num_sequences, place)
    documents_E = np.frombuffer(whole, "<i8", num_ends, place + 8 * num_sequences)
    is_ordered = num_ends and documents_E[0] == 0 and (np.diff(documents_E) >= 0).all()
    if not is_ordered or documents_E[-1] != num_sequences:
        raise _bad(index, f"its documents do not end in order at {num_sequences}")
    if (lengths_S < 0).any():
        raise _bad(index, f"sequence {np.argmin(lengths_S)} has a negative length")
    ends = np.concatenate([[0], np.cumsum(lengths_S)])
    if (wrong := pointers_S != ends[:-1] * dtype.itemsize).any():
        first = int(np.argmax(wrong))
        raise _bad(
            index,
            f"sequence {first} begins at byte {pointers_S[first]}, and not at "
            f"{ends[first] * dtype.itemsize}, where the one before ends",
        )
    if num_bytes != ends[-1] * dtype.itemsize:
        raise DataError(
            f"{data} has {num_bytes} bytes, and {ends[-1] * dtype.itemsize} by its "
            f"index {index.name}; copy both again"
        )
    ids = np.memmap(data, dtype, "r") if num_bytes else np.empty(0, dtype)
    return Indexed(file=data, ids=np.asarray(ids), ends_E=ends[documents_E])


def prepare_megatron(
    path: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    tokenizer: tokenizers.Tokenizer,
    held_out: float,
    seed: int,
    shard_tokens: int = writer.SHARD_TOKENS,
    layout: shards.Layout = shards.CONCAT,
) -> shards.Dataset:
    """Writes the data set `out` from NAME.bin and NAME.idx and opens it.

    Of the same texts and tokenizer it is the one that `prepare.prepare` makes with
    data.split=documents: what is held out goes by the text of the ids, documents
    without any are left out, and BOS, where the tokenizer has one, and EOD are added
    where a document does not have them at its ends. Raises DataError as `open_indexed`,
    and for ids that the tokenizer does not have. Limits: every document is decoded, in
    one process.
    """
    prepare.check_options("documents", held_out, seed, shard_tokens, layout)
    writer.make_way(out)
    indexed = open_indexed(path)
    _check_ids(indexed, tokenizer)
    numbers, keys, num_bytes = [], [], []
    for number in range(len(indexed)):
        if text := tokenizer.decode(_inner(indexed[number], tokenizer)):
            numbers.append(number)
            keys.append(splits.key(text, seed=seed))
            num_bytes.append(len(text.encode("utf-8")))
    if not numbers:
        raise DataError(
            f"{indexed.file} holds no document with text; give another file"
        )
    numbers_D, bytes_D = np.array(numbers), np.array(num_bytes)
    keys_D = np.array(keys, splits.KEY_DTYPE)
    contents = {
        name: writer.SplitContent(
            documents=_Framed(indexed, numbers_D[here], tokenizer),
            text_bytes=int(bytes_D[here].sum()),
        )
        for name, here in splits.split(keys_D, held_out=held_out, seed=seed).items()
    }
    return writer.write_dataset(
        pathlib.Path(out),
        tokenizer=tokenizer,
        splits=writer.laid_out(contents, layout),
        shard_tokens=shard_tokens,
    )


class _Framed(Sequence[np.ndarray]):
    """Documents by their numbers, with BOS and EOD, made when they are asked for."""

    def __init__(
        self,
        indexed: Indexed,
        numbers_D: np.ndarray,
        tokenizer: tokenizers.Tokenizer,
    ):
        self._indexed, self._numbers_D, self._tokenizer = indexed, numbers_D, tokenizer
        self._dtype = tokenizers.id_dtype(tokenizer.vocab_size)

    def __len__(self) -> int:
        return len(self._numbers_D)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        inner = _inner(self._indexed[self._numbers_D[index]], self._tokenizer)
        bos = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        ids = np.concatenate([bos, inner, [self._tokenizer.eod_id]])
        return ids.astype(self._dtype)


def _inner(ids: np.ndarray, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """A document without the BOS and the EOD at its ends."""
    if len(ids) and ids[-1] == tokenizer.eod_id:
        ids = ids[:-1]
    has_bos = tokenizer.bos_id is not None and len(ids) and ids[0] == tokenizer.bos_id
    return ids[1:] if has_bos else ids


def _check_ids(indexed: Indexed, tokenizer: tokenizers.Tokenizer) -> None:
    for start in range(0, len(indexed.ids), _BLOCK):
        block = indexed.ids[start : start + _BLOCK]
        if not 0 <= block.min() <= block.max() < tokenizer.vocab_size:
            place = int(np.argmax((block < 0) | (block >= tokenizer.vocab_size)))
            raise DataError(
                f"{indexed.file} holds the id {block[place]} at place {start + place}, "
                f"and the tokenizer has {tokenizer.vocab_size} ids: it is the wrong "
                "tokenizer; give the one that made the ids by --tokenizer"
            )


def _bad(index: pathlib.Path, what: str) -> DataError:
    return DataError(
        f"{index} is no index of a Megatron data set, or a damaged one: {what}; copy "
        "it again"
    )
