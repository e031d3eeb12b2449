"""What a checkpoint must be: its manifest; `checking` holds files against it.

`manifest.json` is canonical JSON and its last field is the SHA-256 of the rest, so
any changed byte of it shows. It lists every chunk with its size and XXH3-128 digest,
and a restore takes shapes, dtypes and chunking from here alone. Chunk paths follow
from name and grid and must be exactly those: a manifest cannot point elsewhere, nor
leave a chunk out.

Imports no jax, so that `scripts/checkpoint.py` and a supervisor may look.

Limits: digests find damage, not a forger, who can compute them as well.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash

from jaxinfra.checkpoint import commits
from jaxinfra.checkpoint.commits import CheckpointError, IncompatibleCheckpoint

FORMAT_VERSION = 2
MANIFEST = commits.MANIFEST
CHECKSUM_BYTES = 4  # zarr3's crc32c codec appends it to every chunk.
MAX_MANIFEST_BYTES = 256 << 20  # About 1.5 million chunks.
MAX_PADDING_BYTES = 64 << 20  # Of a chunk.
MAX_DEPTH = 64
ITEM_BYTES = {
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64"), 8),
}
_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_FIRST_FIELDS = {
    *("format_version", "step", "run_id", "attempt"),
    *("versions", "config", "data", "arrays"),
}
_FIELDS = {1: _FIRST_FIELDS, 2: _FIRST_FIELDS | {"unix_secs", "metrics"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file of a checkpoint: path within the step's folder, size, digest."""

    path: str
    bytes: int
    xxh3_128: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """One array on disk; `chunks` are in the order of `grid`."""

    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]
    zarr_json: FileRecord
    chunks: tuple[FileRecord, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of one checkpoint besides the arrays' values.

    unix_secs: when it was saved, by the clock of the first process. metrics: figures of
    the step by which steps are kept. Format 1 has neither.
    """

    step: int
    run_id: str
    attempt: int
    versions: dict[str, str]
    config: dict[str, Any]
    data: dict[str, Any]
    arrays: dict[str, ArrayRecord]
    unix_secs: int = 0
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    def files(self) -> Iterator[FileRecord]:
        """Every file that the manifest vouches for."""
        for array in self.arrays.values():
            yield array.zarr_json
            yield from array.chunks


def array_folder(name: str) -> str:
    """Path of an array's chunks, within the checkpoint's folder."""
    return f"arrays/{name}"


def chunk_path(name: str, index: tuple[int, ...]) -> str:
    """Path of one chunk, within the checkpoint's folder."""
    return "/".join([array_folder(name), "c", *map(str, index)])


def grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Indexes of all chunks, last dim fastest; one empty index for rank 0."""
    return itertools.product(*map(range, _grid_shape(shape, chunk)))


def chunk_file_bytes(chunk_shape: tuple[int, ...], dtype: str) -> int:
    """Size of every chunk file: those at the edge are padded to the full shape."""
    return math.prod(chunk_shape) * ITEM_BYTES[dtype] + CHECKSUM_BYTES


def dump(manifest: Mapping[str, Any]) -> bytes:
    """Canonical bytes of a manifest given as JSON values without its `sha256`.

    Raises:
      ValueError: a value is not JSON (NaN and infinity are not).
    """
    body = _canonical(manifest)
    sha256 = hashlib.sha256(body).hexdigest()
    return body[:-1] + f',"sha256":"{sha256}"}}\n'.encode()


def build(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`, parsed once: what is written can be loaded."""
    text = dump({"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)})
    parse(text)
    return text


def parse(text: bytes) -> Manifest:
    """The manifest in `text`, with every field checked.

    Raises:
      CheckpointError: its bytes are not those that were written, or break a rule.
      IncompatibleCheckpoint: sound, of a format that this version cannot read.
    """
    try:
        values = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST}: not JSON: {error}") from error
    _check_depth(values)
    require(isinstance(values, dict), "it must be an object")
    body = {key: value for key, value in values.items() if key != "sha256"}
    require(dump(body) == text, "its bytes do not match its sha256")
    version = body.get("format_version")
    if type(version) is not int or version not in _FIELDS:
        raise IncompatibleCheckpoint(
            f"{MANIFEST}: format_version={version!r:.100}, this version reads 1 to "
            f"{FORMAT_VERSION}; use the jaxinfra that wrote it, or a newer one"
        )
    fields = _FIELDS[version]
    require(set(body) == fields, f"its fields must be {sorted(fields)}, sha256")
    for key in {"versions", "config", "data", "arrays", "metrics"} & fields:
        require(isinstance(body[key], dict), f"{key} must be an object")
    for key in {"step", "attempt", "unix_secs"} & fields:
        require(_is_count(body[key]), f"{key} must be an integer >= 0")
    require(isinstance(body["run_id"], str), "run_id must be a string")
    entries = body["arrays"].items()
    check_arrays({n: v.get("dtype") for n, v in entries if isinstance(v, dict)})
    arrays = {name: _array(name, value) for name, value in body["arrays"].items()}
    body.pop("format_version")
    return Manifest(**{**body, "arrays": arrays})


def plain_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """A copy as JSON reads it back: later changes by the caller do not reach it."""
    is_dict = all(isinstance(value, dict) for value in metadata.values())
    if {*metadata, "metrics"} != {"config", "data", "metrics"} or not is_dict:
        raise ValueError(f"metadata {sorted(metadata)} must be dicts: config, data")
    return json.loads(json.dumps(metadata, allow_nan=False))


def versions() -> dict[str, str]:
    """Versions of what writes a checkpoint, for the reader of a manifest."""
    found = {}
    for name in ("jaxinfra", "jax", "jaxlib", "numpy", "tensorstore"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def check_arrays(dtypes: Mapping[str, str]) -> None:
    """Names are folders below `arrays/`: plain parts, none inside another."""
    for name, dtype in dtypes.items():
        text = f"array {name!r:.200} has dtype {dtype!r:.100}, must be one of "
        is_known = isinstance(dtype, str) and dtype in ITEM_BYTES
        require(is_known, text + ", ".join(ITEM_BYTES))
    parts = sorted(tuple(name.split("/")) for name in dtypes)
    for name in parts:
        plain = all(_NAME.fullmatch(part) for part in name) and len(name) <= 32
        require(plain, f"array name {'/'.join(name)[:200]!r} is not plain")
    for one, other in itertools.pairwise(parts):
        require(other[: len(one)] != one, f"array {one} is inside array {other}")


def digest(data) -> str:
    """XXH3-128 in hex: 16 GB/s on one core, and releases Python's lock."""
    return xxhash.xxh3_128_hexdigest(data)


def _array(name: str, value: Any) -> ArrayRecord:
    """One array's record; its chunks must be exactly those of its grid."""
    fields = {field.name for field in dataclasses.fields(ArrayRecord)}
    where = f"array {name}: "
    require(isinstance(value, dict) and set(value) == fields, f"{where}its fields")
    shape, chunk = value["shape"], value["chunk_shape"]
    for dims, least in ((shape, 0), (chunk, 1)):
        is_shape = isinstance(dims, list) and len(dims) <= 32
        is_shape = is_shape and all(_is_count(dim) and dim >= least for dim in dims)
        require(is_shape, f"{where}shape {dims!r:.100}")
    require(len(shape) == len(chunk), f"{where}shape and chunk_shape differ in rank")
    chunks = value["chunks"]
    # Counted before the grid is walked: a huge shape costs nothing.
    num_chunks = math.prod(_grid_shape(tuple(shape), tuple(chunk)))
    is_whole = isinstance(chunks, list) and len(chunks) == num_chunks
    require(is_whole, f"{where}it must list {num_chunks} chunks")
    size = chunk_file_bytes(tuple(chunk), value["dtype"])
    # A chunk may have padding, of shards that are not whole; not any amount of it.
    most = chunk_file_bytes(tuple(shape), value["dtype"]) + MAX_PADDING_BYTES
    require(size <= most, f"{where}chunks of {size} bytes, far more than it holds")
    indexes = grid(tuple(shape), tuple(chunk))
    return ArrayRecord(
        shape=tuple(shape),
        dtype=value["dtype"],
        chunk_shape=tuple(chunk),
        zarr_json=_file(value["zarr_json"], f"{array_folder(name)}/zarr.json", None),
        chunks=tuple(
            _file(record, chunk_path(name, index), size)
            for record, index in zip(chunks, indexes, strict=True)
        ),
    )


def _file(value: Any, path: str, size: int | None) -> FileRecord:
    fields = {"path", "bytes", "xxh3_128"}
    require(isinstance(value, dict) and set(value) == fields, f"{path}: its fields")
    require(value["path"] == path, f"path {value['path']!r:.100}, must be {path}")
    is_size = _is_count(value["bytes"]) and size in (None, value["bytes"])
    require(is_size, f"{path}: size {value['bytes']!r:.100}")
    found = value["xxh3_128"]
    is_digest = isinstance(found, str) and _DIGEST.fullmatch(found) is not None
    require(is_digest, f"{path}: digest {found!r:.100}")
    return FileRecord(**value)


def _grid_shape(shape: tuple[int, ...], chunk: tuple[int, ...]) -> list[int]:
    return [-(-size // part) for size, part in zip(shape, chunk, strict=True)]


def _canonical(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def _check_depth(values: Any) -> None:
    level = [values]
    for _ in range(MAX_DEPTH):
        inner = [value for value in level if isinstance(value, dict | list)]
        level = [
            leaf
            for value in inner
            for leaf in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    require(False, f"it is nested deeper than {MAX_DEPTH}")


def _finite(text: str) -> float:
    """A float as JSON can write it again; `1e999` and `NaN` are not."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:100]} is not finite")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def require(rule: bool, text: str) -> None:
    """Raises CheckpointError, with the rule that a manifest breaks."""
    if not rule:
        raise CheckpointError(f"{MANIFEST}: {text}")
