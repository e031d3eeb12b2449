"""The low-bit formats: their numbers, and how a real number becomes one of them.

A `Format` rounds numbers that were scaled into its range already, to the nearest (ties
to even) or by chance, so that the mean is right. Codes are what is stored: the value
itself for int8 and fp8, 4 bits for int4 and nf4.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

FormatName = Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2", "mxfp8", "nf4"]

# The 16 quantiles of a normal distribution, scaled to [-1, 1].
# Source: arXiv:2305.14314 appendix E, as bitsandbytes has them.
NF4_CODES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Format:
    """stored: dtype of the codes, two of which share a byte if bits is 4. largest: the
    greatest magnitude. mantissa, least: of a float format, bits after the point and the
    exponent of the smallest normal number. block: values a scale, where the format
    itself says so. has_exponents: scales are powers of two, stored as 8 bits.
    """

    name: FormatName
    stored: jnp.dtype
    bits: int
    largest: float
    mantissa: int = 0
    least: int = 0
    block: int = 0
    has_exponents: bool = False

    @property
    def is_packed(self) -> bool:
        return self.bits == 4

    @property
    def is_float(self) -> bool:
        return self.mantissa > 0


_E4M3, _E5M2 = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")
# Sources: arXiv:2209.05433 (fp8); OCP Microscaling Formats v1.0 section 5 (mxfp8).
FORMATS: dict[str, Format] = {
    "int8": Format("int8", jnp.dtype("int8"), 8, 127.0),
    "int4": Format("int4", jnp.dtype("uint8"), 4, 7.0),
    "fp8_e4m3": Format("fp8_e4m3", _E4M3, 8, 448.0, mantissa=3, least=-6),
    "fp8_e5m2": Format("fp8_e5m2", _E5M2, 8, 57344.0, mantissa=2, least=-14),
    "mxfp8": Format(
        "mxfp8", _E4M3, 8, 448.0, mantissa=3, least=-6, block=32, has_exponents=True
    ),
    "nf4": Format("nf4", jnp.dtype("uint8"), 4, 1.0, block=64),
}


def round_to(y: jax.Array, name: FormatName, bits: jax.Array | None = None):
    """Codes of float32 `y`, of the same shape and not yet packed; what is beyond the
    format's range becomes its largest value.

    `bits`, uint32 of y's shape, rounds by chance: up with the probability that makes
    the mean `y`. None: to the nearest, ties to even (nf4: ties to the lower).
    """
    form = FORMATS[name]
    y = jnp.clip(y.astype(jnp.float32), -form.largest, form.largest)
    chance = None if bits is None else (bits >> 8).astype(jnp.float32) * 2.0**-24
    if name == "nf4":
        return _nearest_code(y) if chance is None else _chosen_code(y, chance)
    if form.is_float:
        return (y if chance is None else _by_chance(y, form, chance)).astype(
            form.stored
        )
    whole = jnp.round(y) if chance is None else jnp.floor(y + chance)
    codes = jnp.clip(whole, -form.largest, form.largest).astype(jnp.int8)
    return codes if name == "int8" else codes.astype(jnp.uint8) & 0xF


def values_of(codes: jax.Array, name: FormatName) -> jax.Array:
    """float32 numbers of codes that are not packed: the inverse of `round_to`."""
    if name == "nf4":
        return _looked_up(codes)
    if name == "int4":  # sign-extend 4 bits
        codes = (codes ^ 8).astype(jnp.int8) - 8
    return codes.astype(jnp.float32)


def scale_for(largest_abs: jax.Array, name: FormatName) -> jax.Array:
    """float32 scale that maps magnitudes up to `largest_abs` into the format's range.

    Never below 2^-126, the smallest normal float32, so that zeros and what a device
    flushes to zero stay zero. A power of two where the format wants one, rounded up, so
    that nothing saturates. Source: arXiv:2506.08027 section 3.1.
    """
    form = FORMATS[name]
    largest_abs = largest_abs.astype(jnp.float32)
    if not form.has_exponents:
        return jnp.maximum(largest_abs / form.largest, 2.0**-126)
    word = jax.lax.bitcast_convert_type(largest_abs, jnp.int32)
    # 448 is 1.75 x 2^8: a greater mantissa needs one power more.
    exponent = (word >> 23) - 127 - 8 + ((word & 0x7FFFFF) > 0x600000)
    scale = power_of_two(jnp.clip(exponent, -126, 127))
    return jnp.where(jnp.isfinite(largest_abs), scale, jnp.nan)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent for int32 from -126 to 127, exactly."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def exponent_of(x: jax.Array) -> jax.Array:
    """int32 floor(log2 |x|) of normal float32 numbers; -127 for zero."""
    return ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127


def _by_chance(y: jax.Array, form: Format, chance: jax.Array) -> jax.Array:
    """`y` to one of the two numbers of a float format around it."""
    step = power_of_two(jnp.maximum(exponent_of(y), form.least) - form.mantissa)
    rounded = jnp.floor(y / step + chance) * step
    return jnp.clip(rounded, -form.largest, form.largest)


def _nearest_code(y: jax.Array) -> jax.Array:
    middles = (NF4_CODES[1:] + NF4_CODES[:-1]) / 2
    return _count(y > middle for middle in middles)


def _chosen_code(y: jax.Array, chance: jax.Array) -> jax.Array:
    below = _count(y >= code for code in NF4_CODES[1:-1])
    low, high = _looked_up(below), _looked_up(below + 1)
    return below + (low + chance * (high - low) < y).astype(jnp.uint8)


def _count(conditions: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, (c.astype(jnp.uint8) for c in conditions))


def _looked_up(codes: jax.Array) -> jax.Array:
    # Selects and no gather: it fuses, and has no sharding of its own to be told.
    values = jnp.full(codes.shape, NF4_CODES[0])
    for code, value in enumerate(NF4_CODES[1:], 1):
        values = jnp.where(codes == code, value, values)
    return values
