"""Chunk files: every process writes its own shards and reads what its mesh needs.

Written through TensorStore as zarr3 with crc32c, so that anyone can open an array
with a zarr reader. Read back from the manifest alone: a chunk is its values in
C order, little-endian, and 4 bytes of crc32c; the XXH3-128 digest of the bytes just
read is compared before any of them is used, so a missing or stale chunk cannot read
as zeros. The digest is taken from memory, not from the file: it covers the way down.

Limits: POSIX folders. A restore holds this process's share in host memory. Typed PRNG
keys are stored by their caller as key data.
"""

import collections
import concurrent.futures
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import tensorstore
import xxhash

from jaxinfra.checkpoint import commits, integrity
from jaxinfra.checkpoint.commits import IncompatibleCheckpoint
from jaxinfra.checkpoint.integrity import ArrayRecord, FileRecord, Manifest
from jaxinfra.checkpoint.snapshot import SnapshotArray

WRITE_TIMEOUT_SECS = 600.0  # Of one chunk: a black hole must not hang a save.

Box = tuple[tuple[int, int], ...]  # First and last + 1, of every dim.


def write_arrays(
    folder: pathlib.Path, arrays: Mapping[str, SnapshotArray]
) -> dict[str, dict[str, str]]:
    """Writes this process's chunks and returns their digests: name -> path -> digest.

    Files are synced, the folders holding them are not.

    Raises:
      OSError, ValueError: from TensorStore, with the system's error code in the text.
    """
    jobs = [
        (name, array, opened, box, values)
        for name, array in arrays.items()
        for opened in [tensorstore.open(_spec(folder, name, array)).result()]
        for box, values in _chunks(array)
    ]

    def write(job) -> tuple[str, str, str]:
        name, array, opened, box, values = job
        index = tuple(first // size for (first, _), size in zip(box, array.chunk_shape))
        path = integrity.chunk_path(name, index)
        window = tuple(slice(*ends) for ends in box)
        writing = opened[window].write(
            values, can_reference_source_data_indefinitely=True
        )
        digest = xxhash.xxh3_128(_padded(values, array.chunk_shape))
        writing.result(timeout=WRITE_TIMEOUT_SECS)
        with open(folder / path, "rb") as file:
            file.seek(-integrity.CHECKSUM_BYTES, 2)
            digest.update(file.read())
        return name, path, digest.hexdigest()

    digests: dict[str, dict[str, str]] = {name: {} for name in arrays}
    with concurrent.futures.ThreadPoolExecutor(commits.THREADS) as pool:
        for name, path, digest in pool.map(write, jobs):
            digests[name][path] = digest
    return digests


def describe_arrays(
    folder: pathlib.Path,
    arrays: Mapping[str, SnapshotArray],
    digests: list[dict[str, dict[str, str]]],
) -> dict[str, ArrayRecord]:
    """Records of all arrays from all processes' digests; writes the `zarr.json`s.

    Raises:
      KeyError: a chunk that no process wrote.
    """

    def describe(item: tuple[str, SnapshotArray]) -> ArrayRecord:
        name, array = item
        found = {path: one for part in digests for path, one in part[name].items()}
        size = integrity.chunk_file_bytes(array.chunk_shape, array.dtype)
        zarr_json = json.dumps(_metadata(array)).encode()
        path = f"{integrity.array_folder(name)}/zarr.json"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        commits.write_synced(folder / path, zarr_json)
        indexes = integrity.grid(array.shape, array.chunk_shape)
        paths = [integrity.chunk_path(name, index) for index in indexes]
        return ArrayRecord(
            shape=array.shape,
            dtype=array.dtype,
            chunk_shape=array.chunk_shape,
            zarr_json=FileRecord(
                path=path, bytes=len(zarr_json), xxh3_128=integrity.digest(zarr_json)
            ),
            chunks=tuple(
                FileRecord(path=path, bytes=size, xxh3_128=found[path])
                for path in paths
            ),
        )

    with concurrent.futures.ThreadPoolExecutor(commits.THREADS) as pool:
        return dict(zip(arrays, pool.map(describe, arrays.items()), strict=True))


def read_arrays(
    folder: pathlib.Path,
    manifest: Manifest,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    logical_shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, jax.Array]:
    """The arrays named in `abstract`, on its shardings; what is padding reads as 0.

    A process reads the chunks under its own shards and no other, each once.

    Raises:
      CheckpointError: a chunk is not as written; names its file, thereby the array.
      IncompatibleCheckpoint: an array is not there, or has another shape or dtype.
    """
    for name, target in abstract.items():
        _check_target(name, manifest, target, logical_shapes.get(name, target.shape))
    # calloc: a block takes no memory before its first chunk lands.
    blocks = {
        name: {
            box: np.zeros([last - first for first, last in box], target.dtype)
            for box in _own_boxes(target)
        }
        for name, target in abstract.items()
    }
    jobs = [
        (manifest.arrays[name], index, boxes, blocks[name])
        for name in abstract
        for index, boxes in _needed(manifest.arrays[name], blocks[name]).items()
    ]

    def read(job) -> None:
        array, index, boxes, blocks_here = job
        here = _chunk_box(array, index)
        values = blocks_here.get(here)
        # The usual case is one chunk for one block: it is read in place.
        if values is None or values.shape != array.chunk_shape or boxes != [here]:
            values = np.empty(array.chunk_shape, array.dtype)
        record = array.chunks[_position(array, index)]
        checksum = bytearray(integrity.CHECKSUM_BYTES)
        integrity.read_into(folder, record, values.reshape(-1).view(np.uint8), checksum)
        for box in boxes:
            if values is blocks_here[box]:
                continue
            both = tuple(
                (max(one[0], other[0]), min(one[1], other[1]))
                for one, other in zip(here, box)
            )
            blocks_here[box][_window(both, box)] = values[_window(both, here)]

    with concurrent.futures.ThreadPoolExecutor(commits.THREADS) as pool:
        collections.deque(pool.map(read, jobs), maxlen=0)
    return {name: _place(target, blocks.pop(name)) for name, target in abstract.items()}


def _chunks(array: SnapshotArray) -> Iterator[tuple[Box, np.ndarray]]:
    """The chunks of this process's shards: where each stands, and its values."""
    for shard in array.shards:
        for index in integrity.grid(shard.values.shape, array.chunk_shape):
            window = tuple(
                slice(i * size, (i + 1) * size)
                for i, size in zip(index, array.chunk_shape)
            )
            values = shard.values[window]
            box = tuple(
                (start + cut.start, start + cut.start + size)
                for start, cut, size in zip(shard.start, window, values.shape)
            )
            yield box, values


def _padded(values: np.ndarray, chunk_shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a chunk's values: at the edge zarr fills up with zeros."""
    if values.shape != chunk_shape:
        full = np.zeros(chunk_shape, values.dtype)
        full[tuple(map(slice, values.shape))] = values
        values = full
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _spec(folder: pathlib.Path, name: str, array: SnapshotArray) -> dict:
    path = folder.absolute() / integrity.array_folder(name)
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": _metadata(array),
        "open": True,
        "assume_metadata": True,  # No process waits for another's zarr.json.
        "store_data_equal_to_fill_value": True,  # A missing chunk is never zeros.
        "fill_missing_data_reads": False,
    }


def _metadata(array: SnapshotArray) -> dict:
    """`zarr.json`. Source: Zarr core specification 3.0; its bytes and crc32c codecs."""
    is_bytes = integrity.ITEM_BYTES[array.dtype] == 1
    endian = {} if is_bytes else {"configuration": {"endian": "little"}}
    grid = {"chunk_shape": list(array.chunk_shape)}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": False if array.dtype == "bool" else 0,
        "codecs": [{"name": "bytes", **endian}, {"name": "crc32c"}],
    }


def _check_target(
    name: str,
    manifest: Manifest,
    target: jax.ShapeDtypeStruct,
    shape: tuple[int, ...],
) -> None:
    if name not in manifest.arrays:
        raise IncompatibleCheckpoint(
            f"step {manifest.step} has no array {name!r}; it was saved from another "
            "model or optimizer: give the config that it was saved with"
        )
    stored = manifest.arrays[name]
    if (stored.shape, stored.dtype) != (tuple(shape), target.dtype.name):
        raise IncompatibleCheckpoint(
            f"array {name!r} of step {manifest.step} is {stored.dtype}{stored.shape}, "
            f"the model wants {target.dtype.name}{tuple(shape)}; give the config that "
            "it was saved with"
        )


def _needed(array: ArrayRecord, boxes) -> dict[tuple[int, ...], list[Box]]:
    """Chunks that overlap any of the boxes, each with those that it overlaps."""
    found = collections.defaultdict(list)
    for box in boxes:
        dims = zip(box, array.shape, array.chunk_shape, strict=True)
        ranges = [
            range(first // chunk, -(-min(last, size) // chunk) if first < size else 0)
            for (first, last), size, chunk in dims
        ]
        for index in itertools.product(*ranges):
            found[index].append(box)
    return found


def _position(array: ArrayRecord, index: tuple[int, ...]) -> int:
    """Where a chunk stands in the record's list: C order."""
    position = 0
    for i, size, chunk in zip(index, array.shape, array.chunk_shape):
        position = position * -(-size // chunk) + i
    return position


def _chunk_box(array: ArrayRecord, index: tuple[int, ...]) -> Box:
    return tuple(
        (i * chunk, min((i + 1) * chunk, size))
        for i, size, chunk in zip(index, array.shape, array.chunk_shape)
    )


def _window(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(
        slice(first - start, last - start)
        for (first, last), (start, _) in zip(inner, outer)
    )


def _own_boxes(target: jax.ShapeDtypeStruct) -> set[Box]:
    indexes = target.sharding.addressable_devices_indices_map(target.shape)
    return {_box(index, target.shape) for index in indexes.values()}


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape))


def _place(target: jax.ShapeDtypeStruct, blocks: Mapping[Box, np.ndarray]) -> jax.Array:
    return jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: blocks[_box(index, target.shape)]
    )
