"""Rates of saving and restoring one state: ours, bare threads, and Orbax, in turn.

    python scripts/peers/checkpoint_rates.py rates FOLDER PAIRS MB [orbax]
    python scripts/peers/checkpoint_rates.py memory FOLDER STAGING_MB MB

`rates`: in every turn the same bytes are written and fsynced by four threads, saved by
us, and by Orbax; then each is dropped from the page cache and read back: by bare
threads, by us with every byte verified, by Orbax, which verifies none. `memory`: what
a save and a restore take of the host above the state, with so much staging (0: no
bound). Both print JSON.
"""

import concurrent.futures
import json
import math
import os
import pathlib
import shutil
import statistics
import sys
import time

import jax
import numpy as np

from jaxinfra.checkpoint import commits, lifecycle, read_back, restore

MB = 1 << 20
ARRAY_MB = 64
METADATA = {"config": {}, "data": {}}


def make_state(size_mb: int) -> dict[str, jax.Array]:
    """Random float32 matrices of 64 MB."""
    rng = np.random.default_rng(0)
    shape = (ARRAY_MB * MB // 4 // 4096, 4096)
    return {
        f"params/w{n}": jax.device_put(rng.random(shape, np.float32))
        for n in range(size_mb // ARRAY_MB)
    }


def raw_write(state: dict[str, jax.Array], folder: pathlib.Path) -> None:
    folder.mkdir()

    def write(item):
        name, array = item
        with open(folder / name.replace("/", "."), "wb", buffering=0) as file:
            rest = memoryview(np.asarray(array).reshape(-1).view(np.uint8))
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    with concurrent.futures.ThreadPoolExecutor(commits.THREADS) as pool:
        list(pool.map(write, state.items()))


def raw_read(folder: pathlib.Path) -> list[np.ndarray]:
    def read(path):
        found = np.empty(path.stat().st_size, np.uint8)
        with open(path, "rb", buffering=0) as file:
            rest = memoryview(found)
            while rest:
                rest = rest[file.readinto(rest) :]
        return found

    with concurrent.futures.ThreadPoolExecutor(commits.THREADS) as pool:
        return list(pool.map(read, sorted(folder.iterdir())))


def settle(size_mb: int) -> None:
    """Waits for the disk, and has the system find memory now rather than in what is
    measured next: a virtual machine may have given it back to its host."""
    os.sync()
    np.ones(3 * size_mb * MB, np.uint8)


def forget(folder: pathlib.Path) -> None:
    """Drops a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            read_back.forget(path)


def rates(folder: pathlib.Path, pairs: int, size_mb: int, has_orbax: bool) -> dict:
    state = make_state(size_mb)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for name, x in state.items()
    }
    secs: dict[str, list[float]] = {}

    def clock(name, call):
        settle(size_mb)
        begin = time.perf_counter()
        found = call()
        jax.block_until_ready(found)
        secs.setdefault(name, []).append(time.perf_counter() - begin)
        return found

    def ours_write():
        saves = lifecycle.Checkpointer(folder / "ours", keep=1, run_id="r", attempt=1)
        saves.save(1, state, metadata=METADATA)
        [report] = saves.close()
        secs.setdefault("blocked", []).append(report.blocked_secs)

    def orbax_write():
        with ocp.StandardCheckpointer() as saves:
            saves.save(folder / "orbax", state)

    def orbax_read():
        with ocp.StandardCheckpointer() as reads:
            return reads.restore(folder / "orbax", abstract)

    kinds = {
        "raw": (
            lambda: raw_write(state, folder / "raw"),
            lambda: raw_read(folder / "raw"),
        ),
        "ours": (
            ours_write,
            lambda: restore.restore(folder / "ours", 1, abstract).arrays,
        ),
    }
    if has_orbax:
        import orbax.checkpoint as ocp

        kinds["orbax"] = (orbax_write, orbax_read)
    for turn in range(pairs + 1):
        clock("copy", lambda: [np.array(x, copy=True) for x in state.values()])
        for name in [*kinds] if turn % 2 else [*reversed(kinds)]:
            write, read = kinds[name]
            shutil.rmtree(folder / name, ignore_errors=True)
            clock(f"{name}_save", write)
            forget(folder / name)
            found = clock(f"{name}_restore", read)
            if name == "ours" and turn == 0:
                same = [np.array_equal(found[n], x) for n, x in state.items()]
                assert all(same)
            del found
    secs = {name: values[1:] for name, values in secs.items()}  # the first warms up
    size = size_mb * MB / 1e6
    result = {f"{n}_mb_per_sec": size / statistics.median(v) for n, v in secs.items()}
    del result["blocked_mb_per_sec"]
    for other in [name for name in kinds if name != "ours"]:
        for what in ("save", "restore"):
            ratios = [
                theirs / ours
                for theirs, ours in zip(
                    secs[f"{other}_{what}"], secs[f"ours_{what}"], strict=True
                )
            ]
            result[f"ours_over_{other}_{what}"] = statistics.median(ratios)
            result[f"ours_over_{other}_{what}_range"] = [min(ratios), max(ratios)]
    extra = [b - c for b, c in zip(secs["blocked"], secs["copy"], strict=True)]
    result["blocked_ms"] = 1e3 * statistics.median(secs["blocked"])
    result["blocked_beyond_copy_ms"] = 1e3 * statistics.median(extra)
    return {"state_mb": size_mb, "pairs": pairs, "threads": commits.THREADS, **result}


def memory(folder: pathlib.Path, staging_mb: int, size_mb: int) -> dict:
    state = make_state(size_mb)
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in state.items()
    }
    bound = staging_mb * MB or math.inf
    saves = lifecycle.Checkpointer(
        folder / "ours", keep=1, run_id="r", attempt=1, staging_bytes=bound
    )
    before = _restart_peak()
    saves.save(1, state, metadata=METADATA)
    [report] = saves.close()
    result = {"staging_mb": staging_mb, "save_peak_mb": _peak() - before}
    result["blocked_ms"] = 1e3 * report.blocked_secs
    del state
    before = _restart_peak()
    found = restore.restore_latest(folder / "ours", abstract, staging_bytes=bound)
    jax.block_until_ready(found.arrays)
    return result | {"restore_peak_mb": _peak() - before - size_mb}


def _restart_peak() -> float:
    """Memory in use, in MB; from here on `_peak` counts anew."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(key: str) -> float:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


if __name__ == "__main__":
    verb, where, number, size, *rest = sys.argv[1:]
    if verb == "rates":
        found = rates(pathlib.Path(where), int(number), int(size), "orbax" in rest)
    else:
        found = memory(pathlib.Path(where), int(number), int(size))
    print(json.dumps(found))
