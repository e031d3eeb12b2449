"""The stream's speed on one core, as JSON. Run by bench.py data.

    python stream_ours.py FOLDER          makes FOLDER/whole (one file of 200 M tokens)
                                          and FOLDER/{a,b,c}, laid out by best fit
    python stream_ours.py FOLDER measure  M tokens a second to the host batch

Batches are 64 rows of 2,048 tokens with their cut positions, shuffled. Documents are as
long as the files of Python's own library, at four bytes a token.
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from jaxinfra.data import batches, shards, writer
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.stages import parse

LENGTH, ROWS, STEPS = 2048, 64, 400
TOKENS = {"whole": 200_000_000, "a": 60_000_000, "b": 60_000_000, "c": 60_000_000}
WEIGHTS = {"a": "0.6", "b": "0.3", "c": "0.1"}


def make(folder: pathlib.Path) -> None:
    sources = pathlib.Path(os.__file__).parent.rglob("*.py")
    real = np.array([p.stat().st_size // 4 for p in sources], np.int64)
    real = real[real > 1]
    for seed, (name, total) in enumerate(TOKENS.items()):
        rng = np.random.default_rng(seed)
        lengths = rng.choice(real, int(2 * total / real.mean()))
        ends = np.cumsum(lengths)
        ends = ends[: np.searchsorted(ends, total) + 1]
        ids = rng.integers(0, 256, ends[-1], np.uint16)
        ids[ends - 1] = 256
        layout = shards.Layout("best_fit", LENGTH) if name != "whole" else shards.CONCAT
        content = writer.SplitContent(
            documents=np.split(ids, ends[:-1]), text_bytes=1, layout=layout
        )
        writer.write_dataset(
            folder / name,
            tokenizer=ByteTokenizer(),
            splits={"train": content},
            shard_tokens=2**30,
        )


def make_index(folder: pathlib.Path) -> None:
    """FOLDER/index: a dataset.json of 100,000 shards and 10**12 tokens, no files."""
    manifest = json.loads((folder / "a" / shards.MANIFEST).read_text())
    train = manifest["splits"]["train"]
    size = {"tokens": 10**7, "documents": 10**4, "rows": 5_000}
    record = train["shards"][0] | size
    train["shards"] = [
        record | {"file": f"train-{number:05d}.tokens.npy"} for number in range(100_000)
    ]
    train |= {"tokens": 10**12, "documents": 10**9}
    (folder / "index").mkdir(exist_ok=True)
    (folder / "index" / shards.MANIFEST).write_text(json.dumps(manifest))


def opening(folder: pathlib.Path) -> dict:
    """Seconds to open FOLDER/index and make a stream of it, and the memory it takes."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, begin = peak(), time.perf_counter()
    split = shards.open_dataset(folder / "index").split("train")
    batches.make_stream(split, length=LENGTH, batch_size=ROWS, seed=0)
    secs = time.perf_counter() - begin
    return {"open_100k_shards_secs": secs, "open_mib": (peak() - before) / 2**10}


def measure(folder: pathlib.Path) -> dict:
    command = [sys.executable, __file__, str(folder), "open"]
    opened = json.loads(subprocess.run(command, stdout=-1, check=True).stdout)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    splits = {
        name: shards.open_dataset(folder / name, verify=False).split("train")
        for name in TOKENS
    }
    whole = batches.make_stream(
        splits.pop("whole"), length=LENGTH, batch_size=ROWS, seed=0
    )
    mixed = batches.make_stream(
        splits,
        length=LENGTH,
        batch_size=ROWS,
        seed=0,
        weights={name: parse(text, key=name) for name, text in WEIGHTS.items()},
    )
    windows = np.lib.stride_tricks.sliding_window_view(
        np.load(folder / "whole" / "train-00000.tokens.npy", mmap_mode="r"), LENGTH + 1
    )
    order = np.random.default_rng(0).permutation(len(windows) // LENGTH) * LENGTH
    bare = lambda step: windows[order[(np.arange(ROWS) + step * ROWS) % len(order)]]
    rates = {"concat_first_pass": _rate(whole.batch, 0)}
    for stream in (whole, mixed):  # every block has been read and checked after it
        for step in range(5 * STEPS):
            stream.batch(step)
    figures: dict[str, list[float]] = {}
    far = {f"concat_from_row_{n:.0e}": int(n) // ROWS for n in (1e3, 1e7, 1e11)}
    for _ in range(5):
        for name, found in (
            ("bare_gather", _rate(bare, 0)),
            *((name, _rate(whole.batch, step)) for name, step in far.items()),
            ("mixture_best_fit", _rate(mixed.batch, 10**6)),
        ):
            figures.setdefault(name, []).append(found)
    rates |= {name: statistics.median(values) for name, values in figures.items()}
    shown = {f"{n}_m_tokens_per_sec": round(rate, 1) for n, rate in rates.items()}
    return shown | {name: round(figure, 2) for name, figure in opened.items()}


def _rate(batch_of, start: int) -> float:
    """M tokens a second."""
    begin = time.perf_counter()
    for step in range(start, start + STEPS):
        batch_of(step)
    return STEPS * ROWS * LENGTH / (time.perf_counter() - begin) / 1e6


if __name__ == "__main__":
    verbs = {"measure": measure, "open": opening}
    if sys.argv[2:]:
        print(json.dumps(verbs[sys.argv[2]](pathlib.Path(sys.argv[1]))))
    else:
        make(pathlib.Path(sys.argv[1]))
        make_index(pathlib.Path(sys.argv[1]))
