"""What a checkpoint holds, and what two have different, in lines for people.

Imports no jax. Arrays are read one at a time, every byte against the manifest.
"""

import datetime
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # gives numpy its bfloat16 and float8  # noqa: F401
import numpy as np

from jaxinfra.checkpoint import checking, integrity
from jaxinfra.checkpoint.integrity import ArrayRecord, Manifest


def read_array(step_folder: Any, record: ArrayRecord) -> np.ndarray:
    """One array, whole, in host memory.

    Raises:
      CheckpointError: naming the file that is not as it was written.
    """
    whole = np.empty(record.shape, record.dtype)
    piece = np.empty(record.chunk_shape, record.dtype)
    checksum = bytearray(integrity.CHECKSUM_BYTES)
    indexes = integrity.grid(record.shape, record.chunk_shape)
    for index, chunk in zip(indexes, record.chunks, strict=True):
        values = piece.reshape(-1).view(np.uint8)
        checking.read_into(step_folder, chunk, values, checksum)
        window = tuple(
            slice(i * size, min((i + 1) * size, end))
            for i, size, end in zip(index, record.chunk_shape, record.shape)
        )
        whole[window] = piece[tuple(slice(0, w.stop - w.start) for w in window)]
    return whole


def describe_checkpoint(step_folder: Any) -> list[str]:
    """The tree of a step's arrays with shapes, dtypes and bytes; its origin; its
    config."""
    manifest = checking.load(step_folder)
    rows, total = [], 0
    for name, array in sorted(manifest.arrays.items()):
        num_bytes = math.prod(array.shape) * integrity.ITEM_BYTES[array.dtype]
        shape = " x ".join(map(str, array.shape)) or "scalar"
        rows.append((name, array.dtype, shape, f"{num_bytes:,}", len(array.chunks)))
        total += num_bytes
    heads = ("array", "dtype", "shape", "bytes", "chunks")
    widths = [max(len(str(row[i])) for row in [heads, *rows]) for i in range(5)]
    line = lambda row: "  ".join(str(x).ljust(w) for x, w in zip(row, widths)).rstrip()
    numbers = sum(math.prod(a.shape) for a in _parameters(manifest))
    versions = ", ".join(f"{k} {v}" for k, v in sorted(manifest.versions.items()))
    return [
        f"step {manifest.step} in {step_folder}",
        f"run {manifest.run_id}, attempt {manifest.attempt}{_when(manifest)}",
        f"written by {versions}",
        f"{len(rows)} arrays, {total:,} bytes; {numbers:,} parameters",
        "",
        *map(line, [heads, *rows]),
        "",
        f"metrics {json.dumps(manifest.metrics, sort_keys=True)}",
        f"data {json.dumps(manifest.data, sort_keys=True)}",
        *(f"{key} = {json.dumps(value)}" for key, value in flat(manifest.config)),
    ]


def diff_checkpoints(a: Any, b: Any) -> list[str]:
    """A line for each setting and each array in which two steps differ; none where
    configs are equal and arrays bit for bit the same.

    Raises:
      CheckpointError: a file that had to be read is damaged.
    """
    one, other = checking.load(a), checking.load(b)
    lines = []
    for kind in ("config", "data"):
        before, after = (dict(flat(getattr(m, kind))) for m in (one, other))
        for key in sorted(before.keys() | after.keys()):
            was, now = (
                json.dumps(x[key]) if key in x else "-" for x in (before, after)
            )
            if was != now:
                lines.append(f"{kind} {key}: {was} -> {now}")
    for name in sorted(one.arrays.keys() | other.arrays.keys()):
        here, there = one.arrays.get(name), other.arrays.get(name)
        if here is None or there is None:
            lines.append(f"array {name}: only in {a if there is None else b}")
        elif (here.shape, here.dtype) != (there.shape, there.dtype):
            shapes = (f"{x.dtype}{list(x.shape)}" for x in (here, there))
            lines.append(f"array {name}: {' -> '.join(shapes)}")
        elif _digests(here) != _digests(there):
            lines += _difference(name, read_array(a, here), read_array(b, there))
    return lines


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value of nested objects."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _digests(array: ArrayRecord) -> Any:
    """What shows that two arrays are the same without reading them."""
    return array.chunk_shape, [chunk.xxh3_128 for chunk in array.chunks]


def _difference(name: str, a: np.ndarray, b: np.ndarray) -> list[str]:
    """How far two arrays are from each other, none where no bit differs."""
    if a.tobytes() == b.tobytes():
        return []
    wide = np.float64 if a.dtype.kind not in "iub" else np.int64
    x, y = a.astype(wide), b.astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(np.subtract(x, y, dtype=np.float64))
        scale = np.maximum(np.abs(x), np.abs(y)).astype(np.float64)
    count = int(np.sum(~((x == y) | (np.isnan(apart) & np.isnan(x) & np.isnan(y)))))
    finite = np.isfinite(apart)
    most = apart.max(where=finite, initial=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = (apart / scale).max(where=finite & (scale > 0), initial=0.0)
    not_finite = int(np.sum(~finite))
    also = f", {not_finite} not finite" if not_finite else ""
    return [
        f"array {name}: {count} of {a.size} differ, by {most:.3g} at most, "
        f"relative {relative:.3g}{also}"
    ]


def _when(manifest: Manifest) -> str:
    if not manifest.unix_secs:
        return ""
    then = datetime.datetime.fromtimestamp(manifest.unix_secs, datetime.UTC)
    return f", {then:%Y-%m-%d %H:%M:%S} UTC"


def _parameters(manifest: Manifest) -> list[ArrayRecord]:
    return [x for name, x in manifest.arrays.items() if name.startswith("params/")]
