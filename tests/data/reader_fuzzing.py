"""Damaged files of texts: whatever the bytes say, reading one gives texts or a
DataError that names the file, without a crash, a hang or memory that grows.

    python reader_fuzzing.py COUNT [SEED]     prints how many ended which way
"""

import collections
import csv
import gzip
import io
import json
import pathlib
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import pyarrow as pa
import zstandard
from pyarrow import parquet

from jaxinfra.config import DataError
from jaxinfra.data import sources

MAX_SECS = 5.0
MAX_MIB = 256
TEXTS = ["plain", "two\nlines, and a comma", 'a "quote"', "café \U0001f469"] * 9


def _lines() -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def _csv() -> bytes:
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["id", "text"], *enumerate(TEXTS)])
    return table.getvalue().encode()


def _table() -> pa.Table:
    return pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})


def _parquet(**options: object) -> bytes:
    out = io.BytesIO()
    parquet.write_table(_table(), out, row_group_size=9, **options)  # pyright: ignore
    return out.getvalue()


def _arrow() -> bytes:
    out, table = io.BytesIO(), _table()
    with pa.ipc.new_stream(out, table.schema) as batches:
        batches.write_table(table, max_chunksize=9)
    return out.getvalue()


MAKE: dict[str, Callable[[], bytes]] = {
    "a.jsonl": _lines,
    "a.csv": _csv,
    "a.parquet": _parquet,
    "b.parquet": lambda: _parquet(compression="none", use_dictionary=False),
    "a.arrow": _arrow,
    "a.jsonl.gz": lambda: gzip.compress(_lines()),
    "a.txt.gz": lambda: gzip.compress("\n".join(TEXTS).encode()),
    "a.jsonl.zst": lambda: zstandard.compress(_lines()),
}


def damage(whole: bytes, rng: random.Random) -> bytes:
    """Bits that are flipped, bytes that are others, or an end that is missing."""
    data = bytearray(whole)
    match rng.randrange(4):
        case 0:
            del data[rng.randrange(len(data)) :]
        case 1:
            for _ in range(rng.choice([1, 4, 64])):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case _:
            for _ in range(rng.choice([1, 1, 1, 4])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def run(count: int, seed: int = 0, names: Sequence[str] = ()) -> collections.Counter:
    """Outcomes of `count` damaged files; raises what is no DataError."""
    rng, outcomes = random.Random(seed), collections.Counter()
    whole = {name: MAKE[name]() for name in names or MAKE}
    with tempfile.TemporaryDirectory() as folder:
        before = 0
        for number in range(count):
            name = [*whole][number % len(whole)]
            file, data = pathlib.Path(folder, name), damage(whole[name], rng)
            file.write_bytes(data)
            begin, told = time.monotonic(), str(file)
            try:
                for _ in sources.read_documents([file]):
                    pass
                outcomes[f"{name} texts"] += 1
            except DataError as error:
                told = str(error)
                outcomes[f"{name} DataError"] += 1
            except BaseException as error:
                raise AssertionError(f"number {number}: {name}, {data!r}") from error
            assert str(file) in told
            assert time.monotonic() - begin < MAX_SECS, (number, name, data)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            before = before or peak
            assert peak - before < MAX_MIB, (number, name, data, peak - before)
    return outcomes


if __name__ == "__main__":
    print(json.dumps(run(*map(int, sys.argv[1:]))))
