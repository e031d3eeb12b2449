"""torch's DataLoader over the same data set, on one core: shuffled rows of 2,048
tokens, 64 a batch, with segment ids and without them, as JSON in M tokens a second."""

import json
import os
import pathlib
import sys
import time

import numpy as np
import torch

LENGTH, ROWS, BATCHES = 2048, 64, 300


def segments_of(ends, start, width):
    """Which document of the row each token is of, from 1."""
    first = np.searchsorted(ends, start, side="right")
    last = np.searchsorted(ends, start + width - 1, side="right")
    cuts = np.concatenate([[start], ends[first:last], [start + width]])
    return np.repeat(np.arange(1, len(cuts), dtype=np.int32), np.diff(cuts))


class Slices(torch.utils.data.Dataset):
    """Rows of a memory map."""

    def __init__(self, tokens, ends):
        self.tokens, self.ends = tokens, ends

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // LENGTH

    def __getitem__(self, i):
        start = i * LENGTH
        row = torch.from_numpy(self.tokens[start : start + LENGTH + 1].astype(np.int32))
        if self.ends is None:
            return row
        return row, torch.from_numpy(segments_of(self.ends, start, LENGTH + 1))


def rate(dataset) -> float:
    """M tokens a second, the best of three."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=ROWS, shuffle=True, num_workers=0
    )
    batches, best = iter(loader), 0.0
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(BATCHES):
            next(batches)
        secs = time.perf_counter() - begin
        best = max(best, BATCHES * ROWS * LENGTH / secs / 1e6)
    return round(best, 1)


os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
tokens = np.load(folder / "train-00000.tokens.npy", mmap_mode="r")
ends = np.load(folder / "train-00000.ends.npy")
rates = {"rows": rate(Slices(tokens, None))}
rates["rows_with_segments"] = rate(Slices(tokens, ends))
print(json.dumps(rates))
