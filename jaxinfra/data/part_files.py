"""The two files of a part of a corpus, written once, whole or not at all.

    NAME.ids     the ids of its documents, one after the other
    NAME.facts   for each document what `recipes.FACTS` says, and what each cleaning
                 step took: `.npy` arrays and a checksum

The facts come last, by a rename, after an fsync of both: a part with facts is whole.
"""

import contextlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import xxhash

from jaxinfra.config import DataError
from jaxinfra.data import leftovers
from jaxinfra.data.recipes import Made

_SUM_BYTES = 16  # of xxh3_128


@contextlib.contextmanager
def writing(path: pathlib.Path, run: str) -> Iterator[Callable[[Made], None]]:
    """Takes what is made, a chunk at a time, one at least; the part is there when the
    block ends. run: a `leftovers.new_owner`."""
    facts, counts, ids_sum = [], [], xxhash.xxh3_128()
    with _written(_ids_file(path), run) as file:

        def add(made: Made) -> None:
            file.write(made.ids_N)
            ids_sum.update(made.ids_N)
            facts.append(made.facts_D)
            counts.append(made.counts_C2)

        yield add
    sum_16 = np.frombuffer(ids_sum.digest(), np.uint8)
    packed = io.BytesIO()
    for array in (np.concatenate(facts), np.sum(counts, axis=0, dtype="i8"), sum_16):
        np.lib.format.write_array(packed, array, allow_pickle=False)
    with _written(_facts_file(path), run) as file:
        file.write(packed.getbuffer())
        file.write(xxhash.xxh3_128_digest(packed.getbuffer()))


def is_whole(path: pathlib.Path, dtype: np.dtype) -> bool:
    """Whether a part is there, every byte as it was written."""
    found = _read_facts(path)
    if found is None:
        return False
    facts_D, _, sum_16 = found
    try:
        with _ids_file(path).open("rb") as file:
            num_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            ids_sum = xxhash.xxh3_128()
            while data := file.read(2**22):
                ids_sum.update(data)
    except OSError:
        return False
    is_long = num_bytes == int(facts_D["tokens"].sum()) * dtype.itemsize
    return is_long and ids_sum.digest() == sum_16.tobytes()


def opened(path: pathlib.Path, dtype: np.dtype) -> Made:
    """A part that is whole, its ids memory-mapped."""
    found = _read_facts(path)
    if found is None:
        raise DataError(
            f"{path.parent} lost a part while it was read; let one process at a time "
            "prepare a data set, and start again"
        )
    facts_D, counts_C2, _ = found
    size = int(facts_D["tokens"].sum())
    ids_N = np.empty(0, dtype)
    if size:
        ids_N = np.memmap(_ids_file(path), dtype, "r", shape=size)
    return Made(ids_N=np.asarray(ids_N), facts_D=facts_D, counts_C2=counts_C2)


def remove_unfinished(folder: pathlib.Path, run: str) -> None:
    """Of writers of this run that were ended."""
    for file in folder.glob(f".*.{run}.tmp"):
        file.unlink(missing_ok=True)


def _read_facts(path: pathlib.Path) -> list[np.ndarray] | None:
    """[facts, counts, checksum of the ids]; None where not there or damaged."""
    try:
        whole = _facts_file(path).read_bytes()
    except OSError:
        return None
    data, checksum = whole[:-_SUM_BYTES], whole[-_SUM_BYTES:]
    if xxhash.xxh3_128_digest(data) != checksum:
        return None
    packed = io.BytesIO(data)
    return [np.lib.format.read_array(packed, allow_pickle=False) for _ in range(3)]


def _ids_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.ids")


def _facts_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.facts")


@contextlib.contextmanager
def _written(path: pathlib.Path, run: str) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and on disk."""
    temporary = leftovers.temporary(path, run)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
