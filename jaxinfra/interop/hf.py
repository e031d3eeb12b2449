"""Parameters from and to published safetensors folders, straight onto a mesh.

Which tensor holds which of our arrays follows from the spec tree and the family's
table: a published matrix is [outputs, inputs], ours has its dims in the order of its
spec, whose `contract` says which are inputs; layers and experts are tensors of their
own. Reading, each process holds one tensor of the file and one of our arrays on the
host; writing, one tensor.
"""

import concurrent.futures
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra import params
from jaxinfra.config import ConfigError, DataError, ModelConfig
from jaxinfra.interop import families, hf_config, tensorfile
from jaxinfra.interop.families import Family
from jaxinfra.params import ParamSpec, Tree
from jaxinfra.sharding import Layout

_STACKED = ("layers", "experts")  # dims whose entries are tensors of their own
_READ_BYTES = 8 * 2**20  # of float32 at a time, in each of 4 threads
# Tensors of old checkpoints that are computed, not learned.
_BUFFERS = re.compile(r".*(attn\.(masked_)?bias|rotary_emb\.inv_freq)")


class Part(NamedTuple):
    """One layer's, or expert's, part of an array of ours: what one tensor holds."""

    path: str
    at: tuple[int, ...]  # in the stacked dims
    rows: tuple[int, int]  # of the tensor's outputs


class Tensor(NamedTuple):
    """A published tensor, [rows, inputs] or [rows], and what it holds, row by row.
    Turned, it is stored as [inputs, rows]."""

    name: str
    rows: int
    inputs: tuple[int, ...]
    parts: tuple[Part, ...]
    is_turned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.rows, *self.inputs)
        return shape[::-1] if self.is_turned else shape


class Stored(Protocol):
    """A tensor in a file, not read yet: `tensorfile.Stored`, or GGUF's."""

    @property
    def file(self) -> pathlib.Path: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start .. stop of the first dim."""
        ...


class Published(NamedTuple):
    """A published model: what its config says, and its tensors by name."""

    where: pathlib.Path
    model: ModelConfig
    family: Family
    stored: Callable[[], Mapping[str, Stored]]


class _Piece(NamedTuple):
    part: Part
    stored: Stored
    is_turned: bool


def open_folder(folder: pathlib.Path) -> Published:
    """The model of the folder's `config.json`; its files are opened when they are
    read."""
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file} cannot be read ({error}); give the folder of a published model"
        ) from error
    if not isinstance(fields, dict):
        raise DataError(f"{file} holds no JSON object; restore the file")
    model = hf_config.read_config(fields, where=str(file))
    family = families.FAMILIES[fields["model_type"]]
    return Published(folder, model, family, lambda: tensorfile.open_folder(folder))


def tensors(model: ModelConfig, specs: Tree, family: Family) -> list[Tensor]:
    """Every published tensor of the model, in the order of our arrays."""
    found: dict[str, Tensor] = {}
    for path, spec in _in_order(params.named(specs)):
        stack, key = _place(path)
        if "experts" in spec.axes or key == "ffn/router":
            key = key.replace("ffn", "experts")
        template = family.names.get(key)
        if template is None:
            raise ConfigError(f"a {family.model_type} has no {key}; it does not fit")
        stacked = [axis for axis in spec.axes if axis in _STACKED]
        for index in np.ndindex(*spec.shape[: len(stacked)]):
            at = dict(zip(stacked, index))
            name = template.format(
                layer=_layer_number(model, stack, at.get("layers", 0)),
                expert=at.get("experts", 0),
            )
            rows, *inputs = _published_shape(spec)
            before = found[name].rows if name in found else 0
            part = Part(path, index, (before, before + rows))
            parts = (*found[name].parts, part) if name in found else (part,)
            is_turned = family.transposed and spec.kind == "matrix"
            found[name] = Tensor(name, before + rows, tuple(inputs), parts, is_turned)
    return list(found.values())


def read_params(
    published: Published,
    model: ModelConfig,
    specs: Tree,
    *,
    layout: Layout,
    dtype: Any,
) -> Tree:
    """The published parameters in `dtype`, laid out as `layout.params` says. `model` is
    the published one, or one that computes the same.

    Raises DataError, before an array is made, for tensors that are missing, unknown or
    of another shape than the config says.
    """
    wanted = tensors(model, specs, published.family)
    pieces: dict[str, list[_Piece]] = {}
    for tensor, place in _matched(published, wanted, tied=model.tied):
        for part in tensor.parts:
            piece = _Piece(part, place, tensor.is_turned)
            pieces.setdefault(part.path, []).append(piece)
    places = dict(params.named(params.shardings(specs, layout, layout.params)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        leaves = [
            _read_array(
                spec,
                pieces[path],
                shape=params.physical_shape(spec, layout),
                place=places[path],
                dtype=np.dtype(dtype),
                pool=pool,
            )
            for path, spec in params.named(specs)
        ]
    return params.unflatten(specs, leaves)


def write_params(
    folder: pathlib.Path,
    weights: Tree,
    model: ModelConfig,
    specs: Tree,
    family: Family,
    *,
    dtype: Any,
    shard_bytes: int = tensorfile.SHARD_BYTES,
) -> None:
    """Writes the published tensors of `weights` into the folder, the vocabulary's
    padding cut off. Limits: all arrays must be within this process's reach."""
    arrays, by_path = dict(params.named(weights)), dict(params.named(specs))

    def make(tensor: Tensor) -> np.ndarray:
        parts = []
        for part in tensor.parts:
            spec = by_path[part.path]
            inner = spec.shape[len(part.at) :]
            whole = np.asarray(_take(arrays[part.path], *part.at))
            cut = whole[tuple(slice(n) for n in inner)]
            parts.append(_to_published(cut, spec))
        joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return (joined.T if tensor.is_turned else joined).astype(dtype)

    tensorfile.write_folder(
        folder,
        [
            tensorfile.Writing(
                t.name, np.dtype(dtype), t.shape, functools.partial(make, t)
            )
            for t in tensors(model, specs, family)
        ],
        shard_bytes=shard_bytes,
    )


def _matched(
    published: Published, wanted: list[Tensor], *, tied: bool
) -> list[tuple[Tensor, Stored]]:
    """Each tensor with its place; nothing missing, nothing left over."""
    folder, family, found = published.where, published.family, published.stored()
    prefix = next(iter(family.names.values())).partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in found):
        # Some folders hold the model without its head, and without its prefix.
        found = {
            name if name == family.names["head"] else prefix + name: stored
            for name, stored in found.items()
        }
    names = {tensor.name for tensor in wanted}
    if missing := sorted(names - found.keys()):
        raise DataError(_names_of("lacks", missing, folder))
    extra = {name for name in found.keys() - names if not _BUFFERS.fullmatch(name)}
    head, embedding = family.names["head"], family.names["embedding"]
    if tied and head in extra and _is_equal(found[head], found[embedding]):
        extra.discard(head)
    if extra:
        raise DataError(_names_of("has unknown", sorted(extra), folder))
    for tensor in wanted:
        if found[tensor.name].shape != tensor.shape:
            raise DataError(
                f"{found[tensor.name].file}: {tensor.name!r} has shape "
                f"{list(found[tensor.name].shape)} and config.json says "
                f"{list(tensor.shape)}; one of the two is of another model"
            )
    return [(tensor, found[tensor.name]) for tensor in wanted]


def _names_of(what: str, names: list[str], folder: pathlib.Path) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    listed = ", ".join(repr(name) for name in names[:3])
    return (
        f"{folder} {what} tensors {listed}{more}: the weights are not those of its "
        "config.json; download the folder again, or correct the config"
    )


def _is_equal(a: Stored, b: Stored) -> bool:
    return a.shape == b.shape and np.array_equal(a.read(), b.read())


def _read_array(
    spec: ParamSpec,
    pieces: list[_Piece],
    *,
    shape: tuple[int, ...],
    place: jax.sharding.Sharding,
    dtype: np.dtype,
    pool: concurrent.futures.Executor,
) -> jax.Array:
    """One of our arrays, each device's part filled from the tensors that hold it."""
    blocks = place.addressable_devices_indices_map(shape)
    ranges = {
        device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        for device, index in blocks.items()
    }
    buffers = {
        block: np.zeros([stop - start for start, stop in block], dtype)
        for block in set(ranges.values())
    }
    list(pool.map(functools.partial(_fill, buffers, spec), pieces))
    shards = [jax.device_put(buffers[block], d) for d, block in ranges.items()]
    array = jax.make_array_from_single_device_arrays(shape, place, shards)
    return jax.block_until_ready(array)  # so that one array at a time is on the host


def _fill(buffers: Mapping[tuple, np.ndarray], spec: ParamSpec, piece: _Piece) -> None:
    """Copies one tensor's part to where it belongs in each block."""
    part, stored, is_turned = piece
    depth = len(part.at)
    wanted = [
        (block, buffer)
        for block, buffer in buffers.items()
        if all(a <= i < b for i, (a, b) in zip(part.at, block))
    ]
    if not wanted:
        return
    shape, (outputs, _) = _one_shape(spec), _inner(spec)
    along, rows = outputs[0], part.rows[1] - part.rows[0]
    unit = rows // shape[along]  # rows of the tensor for one index of that dim
    step = max(1, _READ_BYTES * shape[along] // (4 * math.prod(shape)))
    turned = stored.read().T if is_turned else None
    for start in range(0, shape[along], step):
        stop = min(start + step, shape[along])
        span = [part.rows[0] + unit * n for n in (start, stop)]
        raw = stored.read(*span) if turned is None else turned[slice(*span)]
        array = _from_published(_as_float32(raw), spec, stop - start)
        for block, buffer in wanted:
            here = tuple(i - a for i, (a, _) in zip(part.at, block))
            origin = [start if dim == along else 0 for dim in range(array.ndim)]
            _copy(array, origin, buffer[here], block[depth:])


def _copy(
    array: np.ndarray, origin: list[int], buffer: np.ndarray, block: tuple
) -> None:
    """Copies what `array`, which begins at `origin` of a whole, shares with a block."""
    spans = [
        (max(low, first), min(high, first + size))
        for (low, high), first, size in zip(block, origin, array.shape)
    ]
    if all(a < b for a, b in spans):
        there = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(spans, block))
        here = tuple(slice(a - o, b - o) for (a, b), o in zip(spans, origin))
        buffer[there] = array[here]


def _as_float32(raw: np.ndarray) -> np.ndarray:
    """bfloat16 by its bits, three times as fast as by the dtype's own cast."""
    if raw.dtype == jnp.bfloat16:
        bits = np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)
    return raw


def _inner(spec: ParamSpec) -> tuple[list[int], list[int]]:
    """Dims of one layer or expert: (outputs, inputs), counted without stacked dims."""
    depth = sum(axis in _STACKED for axis in spec.axes)
    inputs = [dim - depth for dim in spec.contract]
    rest = range(len(spec.shape) - depth)
    return [dim for dim in rest if dim not in inputs], inputs


def _one_shape(spec: ParamSpec) -> tuple[int, ...]:
    """The shape of one layer's, or expert's, part."""
    return spec.shape[sum(axis in _STACKED for axis in spec.axes) :]


def _from_published(array: np.ndarray, spec: ParamSpec, count: int) -> np.ndarray:
    """[outputs, inputs] as one layer's dims in the order of the spec, `count` long in
    the first of the outputs: a view."""
    outputs, inputs = _inner(spec)
    shape, order = _one_shape(spec), outputs + inputs
    sizes = [count if dim == outputs[0] else shape[dim] for dim in order]
    return array.reshape(sizes).transpose(np.argsort(order))


def _to_published(array: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """The inverse: [outputs, inputs], or [outputs] of a vector."""
    outputs, inputs = _inner(spec)
    if spec.kind == "embedding":
        return array
    rows = math.prod(array.shape[d] for d in outputs)
    turned = array.transpose(outputs + inputs)
    return turned.reshape((rows, -1) if inputs else (rows,))


def _published_shape(spec: ParamSpec) -> tuple[int, ...]:
    """[outputs, inputs] of a matrix, [outputs] of a vector, a table as it is."""
    shape, (outputs, inputs) = _one_shape(spec), _inner(spec)
    if spec.kind == "embedding":
        return shape
    rows = math.prod(shape[d] for d in outputs)
    return (rows, math.prod(shape[d] for d in inputs)) if inputs else (rows,)


def _place(path: str) -> tuple[tuple[str, int] | None, str]:
    """('pattern', 1) and 'ffn/up' of pattern/1/ffn/up; None and the path outside the
    layers."""
    parts = path.split("/")
    if parts[0] not in ("prefix", "pattern", "suffix"):
        return None, path
    return (parts[0], int(parts[1])), "/".join(parts[2:])


def _layer_number(model: ModelConfig, stack: tuple[str, int] | None, repeat: int):
    match stack:
        case None:
            return 0
        case ("prefix", i):
            return i
        case ("pattern", i):
            return len(model.prefix) + repeat * len(model.pattern) + i
        case (_, i):
            return model.num_layers - len(model.suffix) + i


def _in_order(named: Iterator[tuple[str, ParamSpec]]) -> list[tuple[str, ParamSpec]]:
    """Paths so that arrays that share a tensor come in the order of their rows."""
    return sorted(named, key=lambda item: _ROWS.get(item[0].rpartition("/")[2], 0))


# Order in fused tensors: queries, keys, values; gate, up.
_ROWS = {"key": 1, "key_bias": 1, "up": 1, "value": 2, "value_bias": 2}


def _take(array: jax.Array, *index: int) -> jax.Array:
    return _taken(array, jnp.array(index, jnp.int32)) if index else array


@jax.jit
def _taken(array: jax.Array, index: jax.Array) -> jax.Array:
    for i in range(index.shape[0]):
        array = jax.lax.dynamic_index_in_dim(array, index[i], 0, keepdims=False)
    return array
