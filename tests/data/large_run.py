"""Prepares a large compressed file in one process; prints the most memory of its own.

python large_run.py MEGABYTES FOLDER
"""

import gzip
import json
import pathlib
import random
import re
import sys
import threading

from jaxinfra.data import prepare, recipes, spans

spans.PART_BYTES = 2**18
recipes.CHUNK_CHARS = 2**18


def write(file: pathlib.Path, num_bytes: int) -> None:
    rng = random.Random(0)
    page = " ".join(f"w{rng.randrange(10**6)}" for _ in range(12_000))
    with gzip.open(file, "wb", compresslevel=1) as lines:
        written = 0
        while written < num_bytes:
            start = rng.randrange(len(page) - 4_000)
            line = json.dumps({"text": page[start : start + 4_000]}) + "\n"
            written += lines.write(line.encode())


def own_mib() -> float:
    """Memory of this process that is no map of a file."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+)", status)[0]) / 1024


def main(megabytes: str, name: str) -> None:
    folder = pathlib.Path(name)
    write(folder / "a.jsonl.gz", int(megabytes) * 10**6)
    seen, is_done = [own_mib()], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.01):
            seen.append(own_mib())

    threading.Thread(target=watch).start()
    try:
        prepare.prepare(
            [folder / "a.jsonl.gz"], folder / "set", tokenizer="byte", held_out=0.1,
            split="documents", seed=0, shard_tokens=2**20,
        )  # fmt: skip
    finally:
        is_done.set()
    print(max(seen) - seen[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
