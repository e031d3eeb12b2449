"""Damaged data sets: whatever the bytes say, opening and reading one gives a DataError
or rows, without a crash, a hang or memory that grows.

    python fuzzing.py COUNT [SEED]     prints how many ended which way
"""

import collections
import json
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time
from typing import Any

import numpy as np
import servers

from jaxinfra.config import DataError
from jaxinfra.data import folders, shards, writer
from jaxinfra.data.batches import make_evaluation, make_stream
from jaxinfra.data.remote_folder import RemoteFolder
from jaxinfra.data.tokenizer import ByteTokenizer

MAX_SECS = 5.0
MAX_MIB = 64
_VALUES = (
    0, -1, 1, 2**31, 2**63, 2**64, 10**300, 1.5, float("nan"), True, None, "", "x",
    "../../etc/passwd", "train-00000.tokens.npy", [], {}, [[]], {"a": {}},
)  # fmt: skip


def make(folder: pathlib.Path) -> pathlib.Path:
    """A data set with every kind of file."""
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(0, 256, n), 256) for n in range(1, 30)]
    masks = [rng.integers(0, 2, len(d)) for d in documents]
    contents = {
        "train": writer.SplitContent(
            documents=documents,
            text_bytes=9,
            masks=masks,
            layout=shards.Layout("best_fit", 8),
        ),
        "held_out": writer.SplitContent(
            documents=documents[:9], text_bytes=9, masks=masks[:9]
        ),
    }
    return writer.write_dataset(
        folder, tokenizer=ByteTokenizer(), splits=contents, shard_tokens=200
    ).folder


def damage(folder: pathlib.Path, rng: random.Random) -> str:
    """Changes something in a data set; says what."""
    files = sorted(folder.iterdir())
    path = rng.choice([folder / shards.MANIFEST] * len(files) + files)
    data = bytearray(path.read_bytes())
    kind = rng.choice(["value", "value", "bytes", "cut", "longer", "header"])
    if path.suffix == ".json" and kind == "value":
        manifest = json.loads(data)
        _change(manifest, rng)
        data = bytearray(json.dumps(manifest).encode())
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "longer":
        data += rng.randbytes(rng.randrange(1, 99))
    else:
        end = 128 if kind == "header" else len(data)
        for _ in range(rng.choice([1, 1, 4, 64])):
            data[rng.randrange(min(end, len(data)))] = rng.randrange(256)
    path.write_bytes(data)
    return f"{kind} of {path.name}"


def _change(node: Any, rng: random.Random) -> None:
    """Another value, a key or an item more or less, somewhere in a JSON value."""
    while True:
        keys = [*node] if isinstance(node, dict) else [*range(len(node))]
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and rng.random() < 0.8:
            node = node[key]
            continue
        match rng.randrange(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[str(rng.choice(_VALUES))] = rng.choice(_VALUES)
            case _:
                node[key] = rng.choice(_VALUES)
        return
    if isinstance(node, dict):
        node["key"] = rng.choice(_VALUES)
    else:
        node.append(rng.choice(_VALUES))


def read(folder: pathlib.Path | folders.Folder, verify: bool | str) -> None:
    data = shards.open_dataset(folder, verify=verify)  # pyright: ignore
    stream = make_stream(data.split("train"), length=8, batch_size=16, seed=0)
    for step in (0, 1, 10**9):
        stream.batch(step)
    held_out = make_evaluation(data.split("held_out"), length=5, batch_size=4)
    for step in range(held_out.num_batches):
        held_out.batch(step)


def by_url(folder: pathlib.Path, web: servers.Server) -> folders.Folder:
    """A data set from a server, with a cache of its own."""
    web.files = {f"set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    web.connections.clear()
    return RemoteFolder(f"{web.url}/set", cache_dir=folder / "cache")


def run(
    count: int, seed: int = 0, web: servers.Server | None = None
) -> collections.Counter:
    """Outcomes of `count` damaged data sets; raises what is no DataError.

    web: a server that serves them, to be read by URL.
    """
    rng, outcomes = random.Random(seed), collections.Counter()
    # What reads ahead may still write to a cache that is being removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        whole = make(pathlib.Path(name, "whole"))
        read(whole, verify=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            folder = pathlib.Path(shutil.copytree(whole, f"{name}/{number}"))
            told = damage(folder, rng)
            place = folder if web is None else by_url(folder, web)
            begin = time.monotonic()
            try:
                read(place, verify=rng.choice(["auto", False, False]))
                outcomes["rows"] += 1
            except DataError:
                outcomes["DataError"] += 1
            except BaseException as error:
                raise AssertionError(f"number {number}: {told}") from error
            assert time.monotonic() - begin < MAX_SECS, told
            shutil.rmtree(folder, ignore_errors=True)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < MAX_MIB, f"{grown} MiB more"
    return outcomes


if __name__ == "__main__":
    print(dict(run(*map(int, sys.argv[1:]))))
