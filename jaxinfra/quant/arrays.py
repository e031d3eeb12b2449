"""Quantized arrays: low-bit values and the scales of the groups that share one.

`quantize` makes a `QuantizedArray`, `dequantize` an array again. It is a pytree of two
plain arrays, so it goes through `jit`, `scan`, shardings and checkpoints as any other.
What is static (the format, the dim along which groups lie) counts dims from the end: a
loop over layers may take the first dim off.

    q = quantize(w_DF, "int4", dims=(0,), block=64)      # a scale for 64 values of D
    w_DF = dequantize(q, jnp.bfloat16)

Groups: all values along `dims` share a scale (per tensor: all dims; per channel: the
dims that a matmul contracts), or, with `block`, so many neighbours along the last of
`dims`. Where devices split a dim within blocks, each has the scales of all of it: no
mesh limits a block. Only the two values that share a byte must lie on one device.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxinfra import sharding
from jaxinfra.ops.seam import Einsum, Names
from jaxinfra.params import ParamSpec, Tree
from jaxinfra.quant.formats import (
    FORMATS,
    FormatName,
    exponent_of,
    power_of_two,
    round_to,
    scale_for,
    values_of,
)

Granularity = Literal["tensor", "channel", "block"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales"],
    meta_fields=["format", "dim"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """values: codes, of the array's shape, two a byte along `dim` for 4-bit formats.
    scales: float32 (or uint8, an exponent of two plus 127), of the same rank; each of
    its dims divides the array's, and a scale serves the values of its part. dim:
    negative, the one along which blocks and bytes lie.
    """

    values: jax.Array
    scales: jax.Array
    format: FormatName
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that `dequantize` gives."""
        shape = list(self.values.shape)
        shape[self.dim] *= 2 if FORMATS[self.format].is_packed else 1
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def contract(
        self, einsum: Einsum, equation: str, x: jax.Array, *, out: Names
    ) -> jax.Array:
        """`ops.seam.Wrapped`: a weight kept in few bits, multiplied in x's dtype.

        It crosses `fsdp` as it is stored. Of what it becomes nothing is kept for the
        backward pass, which makes it again; it has no gradient itself.
        """

        def multiply(x: jax.Array, q: QuantizedArray) -> jax.Array:
            w = dequantize(jax.tree.map(_gathered, q), x.dtype)
            return einsum(equation, x, w, out=out)

        return jax.checkpoint(multiply)(x, self)

    def __repr__(self) -> str:
        if not hasattr(self.values, "shape"):  # jax fills trees with other things
            return f"QuantizedArray({self.format}, {self.values}, {self.scales})"
        groups = math.prod(self.scales.shape)
        each = math.prod(self.shape) // max(groups, 1)
        return (
            f"QuantizedArray({self.format}, {list(self.shape)}, {groups} scales of "
            f"{each} values each)"
        )


def quantize(
    x: jax.Array,
    format: FormatName,
    *,
    dims: tuple[int, ...] | None = None,
    block: int = 0,
    bits: jax.Array | None = None,
) -> QuantizedArray:
    """`x` in `format`, each group scaled by its own largest magnitude.

    dims: that share a scale, default all. block: 0 is the format's own (mxfp8: 32, nf4:
    64, else none); a dim that is shorter is one block. bits: uint32 of x's shape,
    rounds by chance and not to the nearest. A group with a value that is not finite
    comes back as NaN.

    Raises:
      ValueError: blocks or bytes do not fit the dim.
    """
    dims = tuple(range(x.ndim)) if dims is None else dims
    return encode(x, scales_of(x, format, dims=dims, block=block), format, dims, bits)


def scales_of(
    x: jax.Array, format: FormatName, *, dims: tuple[int, ...], block: int = 0
) -> jax.Array:
    """float32 scales, of x's rank, of the groups of `quantize`."""
    block, dim = block or FORMATS[format].block, dims[-1] % x.ndim
    magnitudes = jnp.abs(x).astype(jnp.float32)
    if not block:
        return scale_for(jnp.max(magnitudes, axis=dims, keepdims=True), format)
    block = min(block, x.shape[dim])
    if x.shape[dim] % block:
        raise ValueError(
            f"dim {dim} of an array {list(x.shape)} does not divide into blocks of "
            f"{block}; choose a divisor of {x.shape[dim]}"
        )
    part = _undivided(x, dim, block)
    largest = jnp.max(split(magnitudes, dim, part), axis=dim + 1)
    if part < block:  # the largest of the parts, which are few, meet on all devices
        largest = jnp.max(
            split(_relaid(largest, dim), dim, block // part), axis=dim + 1
        )
    return scale_for(largest, format)


def encode(
    x: jax.Array,
    scales: jax.Array,
    format: FormatName,
    dims: tuple[int, ...],
    bits: jax.Array | None = None,
) -> QuantizedArray:
    """`x` in `format` by scales that are known; what they do not cover saturates."""
    form, dim = FORMATS[format], dims[-1] % x.ndim
    codes = round_to(
        _by_groups(jnp.divide, x.astype(jnp.float32), scales), format, bits
    )
    if form.has_exponents:
        is_finite = jnp.isfinite(scales)  # 255 is MX's NaN
        scales = jnp.where(is_finite, exponent_of(scales) + 127, 255).astype(jnp.uint8)
    values = pack(codes, dim) if form.is_packed else codes
    return QuantizedArray(values, scales, format, dim - x.ndim)


def dequantize(q: QuantizedArray, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The array that `q` stands for; computed in float32, returned in `dtype`."""
    form = FORMATS[q.format]
    codes = unpack(q.values, q.dim) if form.is_packed else q.values
    scales = q.scales
    if form.has_exponents:
        exponent = scales.astype(jnp.int32) - 127
        scales = jnp.where(scales == 255, jnp.nan, power_of_two(exponent))
    return _by_groups(jnp.multiply, values_of(codes, q.format), scales).astype(dtype)


def quantize_parameter(
    w: jax.Array,
    spec: ParamSpec,
    format: FormatName,
    granularity: Granularity = "channel",
    *,
    block: int = 0,
    bits: jax.Array | None = None,
) -> QuantizedArray:
    """A parameter in `format`: a scale per tensor (of each layer and expert), per
    channel, or per `block` along the last dim that a matmul contracts.

    `w` may lack the spec's leading dims, as in a loop over layers. An embedding, which
    contracts nothing, is scaled row by row.
    """
    gone = len(spec.shape) - w.ndim
    stacks = [d for d, name in enumerate(spec.axes) if name in ("layers", "experts")]
    match granularity:
        case "tensor":
            dims = tuple(d for d in range(len(spec.shape)) if d not in stacks)
        case _:
            dims = spec.contract or (len(spec.shape) - 1,)
    dims = tuple(d - gone for d in dims)
    if granularity != "block" and FORMATS[format].block:
        raise ValueError(f"{format} has blocks by definition; use granularity 'block'")
    return quantize(
        w, format, dims=dims, block=block if granularity == "block" else 0, bits=bits
    )


def shardings(q: QuantizedArray, place: jax.NamedSharding) -> QuantizedArray:
    """NamedShardings of the two arrays of `q` (shapes will do), for an array that lies
    as `place` says: scales lie with their values, but whole along a dim that is split
    within blocks.

    Raises:
      ValueError: a dim is split within the pairs that share a byte.
    """
    spec = (*place.spec, *(None,) * (len(q.values.shape) - len(place.spec)))
    parts = [sharding.axis_product(place.mesh, sharding.axes_of(e)) for e in spec]
    if q.values.shape[q.dim] % parts[q.dim]:
        raise ValueError(
            f"dim {len(spec) + q.dim} of an array {list(q.shape)} is split over mesh "
            f"axes {sharding.axes_of(spec[q.dim])} of size {parts[q.dim]}, and 4-bit "
            "values are stored in pairs; use int8, or fewer devices along these axes"
        )
    scales = [
        None if size == 1 or size % n else entry
        for size, n, entry in zip(q.scales.shape, parts, spec)
    ]
    make = lambda entries: jax.NamedSharding(place.mesh, jax.P(*entries))
    return dataclasses.replace(q, values=make(spec), scales=make(scales))


def dequantize_tree(tree: Tree, dtype: jnp.dtype) -> Tree:
    """`tree` with an array in place of each QuantizedArray."""
    return jax.tree.map(
        lambda leaf: dequantize(leaf, dtype) if is_quantized(leaf) else leaf,
        tree,
        is_leaf=is_quantized,
    )


def is_quantized(leaf: Any) -> bool:
    """For `jax.tree.map(..., is_leaf=is_quantized)`."""
    return isinstance(leaf, QuantizedArray)


def pack(codes: jax.Array, dim: int) -> jax.Array:
    """Two 4-bit codes a byte: of neighbours along `dim`, the first in the low bits.
    Where two devices share a pair, all have the dim whole.

    Raises:
      ValueError: the dim is odd.
    """
    dim %= codes.ndim
    if codes.shape[dim] % 2:
        raise ValueError(
            f"dim {dim} of an array {list(codes.shape)} is odd, and 4-bit values are "
            "stored in pairs; use int8 or another dim"
        )
    if _undivided(codes, dim, 2) < 2:
        codes = _relaid(codes, dim)
    pairs = split(codes, dim, 2)
    low, high = (
        jax.lax.index_in_dim(pairs, i, dim + 1, keepdims=False) for i in range(2)
    )
    return low | (high << 4)


def unpack(values: jax.Array, dim: int) -> jax.Array:
    """The inverse of `pack`."""
    dim %= values.ndim
    return _join(jnp.stack([values & 0xF, values >> 4], axis=dim + 1), dim)


def split(x: jax.Array, dim: int, size: int) -> jax.Array:
    """`x` with `dim` cut into [parts, size]; devices have whole parts."""
    shape = (*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1 :])
    spec = jax.typeof(x).sharding.spec
    return _reshape(x, shape, (*spec[: dim + 1], None, *spec[dim + 1 :]))


def _gathered(x: jax.Array) -> jax.Array:
    """Whole over `fsdp`."""
    spec = jax.typeof(x).sharding.spec
    whole = sharding.gathered(spec)
    return x if whole == spec else jax.reshard(x, whole)


def _by_groups(operation, x: jax.Array, scales: jax.Array) -> jax.Array:
    """operation(x, scale of each value), without an array of x's size of scales: a
    compiler would write it out before it reads it."""
    for dim, (parts, size) in enumerate(zip(scales.shape, x.shape, strict=True)):
        if parts not in (1, size):  # the one dim that has blocks
            block = size // parts
            part = _undivided(x, dim, block)
            if part < block:
                scales = jnp.repeat(scales, block // part, axis=dim)
                scales = _relaid(scales, dim, jax.typeof(x).sharding.spec[dim])
            blocks = split(x, dim, part)
            return _join(operation(blocks, jnp.expand_dims(scales, dim + 1)), dim)
    return operation(x, scales)


def _undivided(x: jax.Array, dim: int, block: int) -> int:
    """The largest part of a block of `dim` that no two devices share."""
    place = jax.typeof(x).sharding
    axes = sharding.axes_of(place.spec[dim])
    return math.gcd(block, x.shape[dim] // sharding.axis_product(place.mesh, axes))


def _relaid(x: jax.Array, dim: int, entry: Any = None) -> jax.Array:
    """`x` with `dim` over the mesh axes of `entry`; default: whole."""
    spec = jax.typeof(x).sharding.spec
    return jax.reshard(x, jax.P(*spec[:dim], entry, *spec[dim + 1 :]))


def _join(x: jax.Array, dim: int) -> jax.Array:
    """The inverse of `split`."""
    shape = (*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :])
    spec = jax.typeof(x).sharding.spec
    return _reshape(x, shape, (*spec[: dim + 1], *spec[dim + 2 :]))


def _reshape(x: jax.Array, shape: tuple[int, ...], entries: tuple) -> jax.Array:
    # A sharding is said where there is one: without a mesh, or on Auto axes, is none.
    is_split = any(entry is not None for entry in entries)
    place = jax.P(*entries) if is_split else None
    return jax.lax.reshape(x, shape, out_sharding=place)
