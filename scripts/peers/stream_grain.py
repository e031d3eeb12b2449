"""Grain over the same data set, on one core, 64 rows of 2,048 tokens a batch, as JSON
in M tokens a second: rows of the memory map, with segment ids and without them; and its
own packing of shuffled documents, which makes them itself."""

import json
import os
import pathlib
import sys
import time

import grain
import numpy as np

LENGTH, ROWS, BATCHES = 2048, 64, 300


def segments_of(ends, start, width):
    """Which document of the row each token is of, from 1."""
    first = np.searchsorted(ends, start, side="right")
    last = np.searchsorted(ends, start + width - 1, side="right")
    cuts = np.concatenate([[start], ends[first:last], [start + width]])
    return np.repeat(np.arange(1, len(cuts), dtype=np.int32), np.diff(cuts))


class Slices(grain.sources.RandomAccessDataSource):
    """Rows of a memory map."""

    def __init__(self, tokens, ends):
        self.tokens, self.ends = tokens, ends

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // LENGTH

    def __getitem__(self, i):
        start = i * LENGTH
        row = np.asarray(self.tokens[start : start + LENGTH + 1])
        if self.ends is None:
            return row
        return {"tokens": row, "segments": segments_of(self.ends, start, LENGTH + 1)}


class Documents(grain.sources.RandomAccessDataSource):
    """Documents of a memory map."""

    def __init__(self, tokens, ends):
        self.tokens, self.ends = tokens, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i):
        start = self.ends[i - 1] if i else 0
        return {"tokens": np.asarray(self.tokens[start : self.ends[i]])}


def rate(batches) -> float:
    """M tokens a second, the best of three."""
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(BATCHES):
            next(batches)
        secs = time.perf_counter() - begin
        best = max(best, BATCHES * ROWS * LENGTH / secs / 1e6)
    return round(best, 1)


os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
folder = pathlib.Path(sys.argv[1])
tokens = np.load(folder / "train-00000.tokens.npy", mmap_mode="r")
ends = np.load(folder / "train-00000.ends.npy")
options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def shuffled(source):
    dataset = grain.MapDataset.source(source)
    return dataset.shuffle(seed=0).repeat()


def of_rows(source):
    return iter(shuffled(source).batch(ROWS).to_iter_dataset(options))


packed = grain.experimental.ConcatThenSplitIterDataset(
    shuffled(Documents(tokens, ends)).to_iter_dataset(options),
    length_struct={"tokens": LENGTH + 1},
)
rates = {"rows": rate(of_rows(Slices(tokens, None)))}
rates["rows_with_segments"] = rate(of_rows(Slices(tokens, ends)))
BATCHES //= 5
rates["packed_documents"] = rate(iter(packed.batch(ROWS)))
print(json.dumps(rates))
