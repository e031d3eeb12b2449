"""data/digest of a mixture with a ramp: the same on any processes, mesh and restart."""

import pathlib
import random
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxinfra.data import shards, writer
from jaxinfra.data.tokenizer import ByteTokenizer

SCRIPT = pathlib.Path(__file__).with_name("digest_run.py")
ROOT = SCRIPT.parents[2]
STEPS = 200
LAYOUTS = {"a": ("concat", 0), "b": ("best_fit", 64), "c": ("documents", 64)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Three data sets, one of each layout, one with masks, in several shards."""
    folder = tmp_path_factory.mktemp("sets")
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        rng = np.random.default_rng(number)
        documents = [
            np.append(rng.integers(0, 256, n), 256) for n in rng.integers(2, 200, 90)
        ]
        masks = [rng.integers(0, 2, len(d)) for d in documents] if name == "a" else None
        content = writer.SplitContent(
            documents=documents,
            text_bytes=1,
            masks=masks,
            layout=shards.Layout(*layout),
        )
        writer.write_dataset(
            folder / name,
            tokenizer=ByteTokenizer(),
            splits={"train": content},
            shard_tokens=3_000,
        )
    return folder


def start(sets, *, mesh=1, depth=2, steps=(0, STEPS), job=()):
    words = [sets, mesh, depth, *steps, *job]
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )


def digests(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return [int(word) for word in out.splitlines() if word.isdigit()]


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def alone(sets):
    found = digests(start(sets, depth=0))
    assert len(found) == len(set(found)) == STEPS
    return found


def test_eight_devices_and_prefetch_change_nothing(sets, alone):
    assert digests(start(sets, mesh=8, depth=3)) == alone


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [1, 2, 4])
def test_no_mesh_changes_the_digest(sets, alone, mesh):
    assert digests(start(sets, mesh=mesh)) == alone


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_real_processes_together_see_the_same(sets, alone, count):
    here = port()
    jobs = [start(sets, mesh=4, job=(here, count, rank)) for rank in range(count)]
    assert [digests(job) for job in jobs] == [alone] * count


@pytest.mark.slow
def test_ten_restarts_at_random_steps_miss_and_repeat_nothing(sets, alone):
    cuts = sorted(random.Random(0).sample(range(1, STEPS), 10))
    found = []
    for begin, end in zip([0, *cuts], [*cuts, STEPS], strict=True):
        mesh = random.Random(begin).choice([1, 2, 4, 8])
        found += digests(start(sets, mesh=mesh, steps=(begin, end)))
    assert found == alone
