"""Small files that would fill the memory, or take the day."""

import gzip
import json
import os
import pathlib
import resource
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from faults import rig as rigs
from faults.hostile import TYPED, checkpoint, data_set
from faults.rig import Outcome, Rig
from jaxinfra import options, runfolder
from jaxinfra.checkpoint import checking, integrity, restore
from jaxinfra.data import idx, megatron, prepare, shards, tokenizer_files
from jaxinfra.interop import tensorfile
from jaxinfra.resilience import ownership

MAX_SECS, MAX_MIB = 5.0, 64

Load = Callable[[pathlib.Path], Any]


def trial_31(rig: Rig, number: int) -> Outcome:
    """A small file that would fill the memory or the day; an error, or an end, in
    seconds."""
    out = Outcome()
    assert rig.quiet  # made before the clock runs
    name, bomb = list(_BOMBS.items())[number % len(_BOMBS)]

    def run(folder: pathlib.Path) -> dict[str, Any]:
        act, limit_mib = bomb(rig, folder)
        before, began = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            time.process_time(),
        )
        try:
            act()
            told = "loaded"
        except TYPED as error:
            told = type(error).__name__
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        secs = time.process_time() - began
        return {
            "told": told,
            "secs": secs,
            "mib": (after - before) / 1024,
            "limit": limit_mib,
        }

    with rig.folder() as folder:
        ended = rigs.forked(lambda: run(folder), timeout_secs=60)
    v = ended.value
    if v is None:
        out.check(False, f"{name}: {ended.code} {ended.text[-350:]}")
        return out
    out.check(v["secs"] <= MAX_SECS, f"{name}: {v['secs']:.1f} s ({v['told']})")
    too_much = v["mib"] > v["limit"] + MAX_MIB
    out.check(not too_much, f"{name}: {v['mib']:.0f} MiB more ({v['told']})")
    out.figures = {"secs": v["secs"], "grown_mib": v["mib"]}
    return out


def _manifest_bomb(change: Callable[[dict], Any], *, is_sparse: bool = False):
    """A manifest that lies about one array; `verify` and `latest` look at it.
    is_sparse: its first chunk's file has the size that is told."""

    def make(rig: Rig, folder: pathlib.Path):
        checkpoint(rig, folder)
        step = folder / "checkpoints" / str(rigs.SAVE_EVERY)
        body = json.loads((step / integrity.MANIFEST).read_text())
        body.pop("sha256")
        name, array = next(
            (n, a) for n, a in body["arrays"].items() if len(a["shape"]) > 1
        )
        change(array)
        (step / integrity.MANIFEST).write_bytes(integrity.dump(body))
        if is_sparse:
            first = array["chunks"][0]
            os.truncate(step / first["path"], first["bytes"])

        def act() -> None:
            if not checking.validate(step):
                raise AssertionError(f"{name} is called good")
            restore.latest(folder / "checkpoints")

        return act, 0

    return make


def _huge(size: int, *keys: str) -> Callable[[dict], None]:
    def change(array: dict) -> None:
        for key in keys or ("shape", "chunk_shape"):
            array[key][0] = size
        rest = int(np.prod(array["chunk_shape"][1:]))
        of_item = integrity.ITEM_BYTES[array["dtype"]]
        array["chunks"] = array["chunks"][:1]
        array["chunks"][0]["bytes"] = size * rest * of_item + integrity.CHECKSUM_BYTES
        array["shape"][1:] = array["chunk_shape"][1:]

    return change


def _text_bomb(
    name: str, text: bytes | Callable[[], bytes], load: Load, mib: float = 0
):
    """A file of that name with that content, and what reads it."""

    def make(rig: Rig, folder: pathlib.Path):
        del rig
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text())
        return lambda: load(folder), mib

    return make


def _sparse(name: str, size: int, load: Load, mib: float = 0):
    def make(rig: Rig, folder: pathlib.Path):
        del rig
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        os.truncate(folder / name, size)
        return lambda: load(folder), mib

    return make


def _resume(folder: pathlib.Path) -> None:
    config, _ = options.read_command([f"--run.dir={folder}"])
    runfolder.check_resume(config)


def _prepare(name: str) -> Load:
    def load(folder: pathlib.Path) -> None:
        prepare.prepare([folder / name], folder / "set", tokenizer="byte", seed=0,
                        split="documents", held_out=0.1)  # fmt: skip

    return load


def _data_bomb(change: Callable[[dict], Any]):
    def make(rig: Rig, folder: pathlib.Path):
        data_set(rig, folder)
        value = json.loads((folder / shards.MANIFEST).read_text())
        change(value["splits"]["train"])
        (folder / shards.MANIFEST).write_text(json.dumps(value))
        return lambda: shards.open_dataset(folder, verify=True), 0

    return make


def _tokens(count: int) -> Callable[[dict], None]:
    def change(split: dict) -> None:
        split["tokens"] = split["shards"][0]["tokens"] = count

    return change


def _tensor(shape: list[int], size: int) -> bytes:
    record = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"a": record}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(24)


_DEEP = b"[" * 5_000_000
_WEIGHTS = lambda folder: tensorfile.open_folder(folder)
_STEP = f"checkpoints/{rigs.SAVE_EVERY}/{integrity.MANIFEST}"
_STEPS = lambda folder: _latest(folder)


def _latest(folder: pathlib.Path) -> None:
    checking.load((folder / _STEP).parent)


_BOMBS: dict[str, Any] = {
    "manifest: a shape of 2**62 rows in few chunks": _manifest_bomb(
        lambda array: array["shape"].__setitem__(0, 2**62)
    ),
    "manifest: one chunk of 2**50 rows, its file small": _manifest_bomb(_huge(2**50)),
    "manifest: one chunk of 3 GiB for a small array, its file sparse": _manifest_bomb(
        _huge(3 * 2**20 * 8, "chunk_shape"), is_sparse=True
    ),
    "manifest: nested 5,000,000 deep": _text_bomb(_STEP, _DEEP, _STEPS),
    "manifest: a sparse file of 1 TiB": _sparse(_STEP, 2**40, _STEPS),
    "config.json: nested 5,000,000 deep": _text_bomb("config.json", _DEEP, _resume),
    "option: a value nested 100,000 deep": _text_bomb(
        "x", b"", lambda _: options.read_command(["--model.pattern", "[" * 100_000])
    ),
    "owner record: a sparse file of 1 TiB": _sparse(
        "owner.1.json", 2**40, lambda folder: ownership.acquire(folder).release()
    ),
    "safetensors: a header of 2**63 bytes": _text_bomb(
        tensorfile.WEIGHTS, struct.pack("<Q", 2**63) + b"{}", _WEIGHTS
    ),
    "safetensors: a shape of 2**60 numbers": _text_bomb(
        tensorfile.WEIGHTS, _tensor([2**30, 2**30], 24), _WEIGHTS
    ),
    "safetensors: data of 2**60 bytes": _text_bomb(
        tensorfile.WEIGHTS, _tensor([2**58], 2**60), _WEIGHTS
    ),
    "safetensors index: nested 5,000,000 deep": _text_bomb(
        tensorfile.INDEX, _DEEP, _WEIGHTS
    ),
    "dataset.json: 10**18 tokens": _data_bomb(_tokens(10**18)),
    "dataset.json: nested 5,000,000 deep": _text_bomb(
        shards.MANIFEST, _DEEP, lambda folder: shards.open_dataset(folder)
    ),
    "idx: 2**96 pixels": _text_bomb(
        "a.idx",
        struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3),
        lambda folder: idx.read(folder / "a.idx", num_dims=3),
    ),
    # A line may have 256 MiB (`readers.MAX_LINE_BYTES`), which is read as it is
    # unpacked.
    "text: 2 GiB without a line end, in 2 MB of gzip": _text_bomb(
        "a.jsonl.gz", lambda: _zeros(2**31), _prepare("a.jsonl.gz"), 3 * 256
    ),
    "tokenizer.json: nested 5,000,000 deep": _text_bomb(
        "tokenizer.json", _DEEP,
        lambda folder: tokenizer_files.load_tokenizer(folder, eod="x", bos="never"),
    ),
    "Megatron index: 2**60 documents": _text_bomb(
        "a.idx",
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**60, 2**60),
        lambda folder: megatron.open_indexed(folder / "a"),
    ),
}  # fmt: skip


def _zeros(size: int) -> bytes:
    piece = gzip.compress(bytes(2**24), 1)  # gzip's members follow one another
    return piece * (size // 2**24)
