"""Adam with both moments in 8 bits: a fifth to a quarter of the optimizer's memory.

A moment is stored in blocks of up to 64 neighbours along the last dim, each with a
float32 scale, and companded, so that small values have finer steps: the first moment as
the signed cube root of m, the second as the cube root of sqrt(v), on a linear grid.
Both are rounded by chance: an average that moves by less than half a step would else
stand still. A second moment is never rounded to zero, which would be divided by.

Vectors (norms, biases) stay in float32: they are few, and the most sensitive.

Source: block-wise 8-bit optimizers, arXiv:2110.02861 section 2. Its dynamic code is
replaced by one in closed form: no table to look up on a device, and where moments of a
block are of very different sizes an update is nearer (a test compares the two; square
roots and a linear grid were worse from a spread of e^1.5 on).
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxinfra.params import Tree, named, unflatten
from jaxinfra.quant.random_bits import bits_like, mix

BLOCK = 64
_SMALLEST = 2.0**-40  # of a scale: the sixth power of a code is still a float32


class Moment(NamedTuple):
    """values: int8 (first) or uint8 (second), of the parameter's shape. scales:
    float32, of the same rank, one for each block of the last dim."""

    values: jax.Array
    scales: jax.Array


def scale_by_adam8(
    specs: Tree, *, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, its state's moments a `Moment` for all but vectors."""
    paths = [path for path, _ in named(specs)]
    vectors = {path for path, spec in named(specs) if spec.kind == "vector"}

    def leaves(tree: Tree) -> list:
        return jax.tree.structure(specs).flatten_up_to(tree)

    def stored(which: str, moments: list[jax.Array], step: jax.Array) -> Tree:
        return unflatten(
            specs,
            [
                m if path in vectors else encode(f"{which}/{path}", m, step)
                for path, m in zip(paths, moments, strict=True)
            ],
        )

    def init(params):
        zeros = [jnp.zeros(p.shape, jnp.float32) for p in leaves(params)]
        moments = (stored(which, zeros, jnp.uint32(0)) for which in ("mu", "nu"))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), *moments)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        grads = leaves(updates)
        mu = [decode("mu/", old) for old in leaves(state.mu)]
        nu = [decode("nu/", old) for old in leaves(state.nu)]
        mu = [b1 * m + (1 - b1) * g for m, g in zip(mu, grads, strict=True)]
        nu = [b2 * v + (1 - b2) * g * g for v, g in zip(nu, grads, strict=True)]
        unbiased = lambda x, b: x / (1 - b ** count.astype(jnp.float32))
        direction = [
            unbiased(m, b1) / (jnp.sqrt(unbiased(v, b2)) + eps)
            for m, v in zip(mu, nu, strict=True)
        ]
        step = count.astype(jnp.uint32)
        moments = stored("mu", mu, step), stored("nu", nu, step)
        return unflatten(specs, direction), optax.ScaleByAdamState(count, *moments)

    return optax.GradientTransformation(init, update)


def other_moments(
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    stored: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[dict], dict]]:
    """A checkpoint of moments of one width is one of the other too: (the arrays to read
    of it, what makes the arrays of `abstract` of them).

    abstract: path -> shape, dtype and sharding of every array of a state. stored: path
    -> shape of every array of the checkpoint. What is in both, or in neither, stays.
    """
    plain, wide, narrow = {}, [], []
    for name, like in abstract.items():
        whole, _, part = name.rpartition("/")
        if name not in stored and part in Moment._fields and whole in stored:
            if part == "values":
                plain[whole] = _like(like, like.shape, jnp.float32)
                wide.append(whole)
        elif name not in stored and f"{name}/values" in stored:
            for part, size in zip(Moment._fields, (like.shape[-1], None), strict=True):
                path = f"{name}/{part}"
                shape = (*like.shape[:-1], size or stored[path][-1])
                kind = _kind(name) if size else jnp.float32
                plain[path] = _like(like, shape, kind)
            narrow.append(name)
        else:
            plain[name] = like

    def convert(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        arrays = dict(arrays)
        place = lambda name: abstract[name].sharding
        for name in wide:
            whole = lambda x, name=name: encode(name, x, jnp.uint32(0))
            parts = [f"{name}/{part}" for part in Moment._fields]
            moment = _in_place(whole, Moment(*map(place, parts)))(arrays.pop(name))
            arrays |= dict(zip(parts, moment, strict=True))
        for name in narrow:
            moment = Moment(*(arrays.pop(f"{name}/{part}") for part in Moment._fields))
            back = lambda moment, name=name: decode(name, moment)
            arrays[name] = _in_place(back, place(name))(moment)
        return {name: arrays[name] for name in abstract}

    return plain, convert


def encode(name: str, x: jax.Array, step: jax.Array) -> Moment:
    """The moment `name`, whose path has mu or nu in it, as it is stored after `step`;
    the chances follow from both and from each element's place."""
    top = 255.0 if _is_second(name) else 127.0
    root = jnp.cbrt(jnp.sqrt(x) if _is_second(name) else x)
    blocks = _blocks(root)
    scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1) / top, _SMALLEST)
    seed = mix(step + jnp.uint32(zlib.crc32(name.encode())))
    chance = (_blocks(bits_like(x, seed)) >> 8).astype(jnp.float32) * 2.0**-24
    grid = jnp.floor(blocks / scale[..., None] + chance)
    least = (blocks > 0).astype(jnp.float32) if _is_second(name) else -top
    codes = jnp.clip(grid, least, top).reshape(x.shape)
    return Moment(codes.astype(_kind(name)), scale)


def decode(name: str, moment: Any) -> jax.Array:
    """float32 of what `encode` gave; of a moment that is an array, that."""
    if not isinstance(moment, Moment):
        return moment
    blocks = _blocks(moment.values.astype(jnp.float32)) * moment.scales[..., None]
    root = blocks.reshape(moment.values.shape)
    cube = root * root * root
    return cube * cube if _is_second(name) else cube


def _in_place(function: Callable, places: Any) -> Callable:
    """`function` by all the devices that have parts of its arrays, whichever process
    they are of; its results lie at `places`."""
    return jax.jit(jax.sharding.auto_axes(function, out_sharding=places))


def _is_second(name: str) -> bool:
    return "nu" in name.split("/")


def _kind(name: str) -> jnp.dtype:
    return jnp.dtype(jnp.uint8 if _is_second(name) else jnp.int8)


def _like(like: jax.ShapeDtypeStruct, shape: tuple[int, ...], dtype: jnp.dtype):
    """Of another shape and dtype, laid out as `like` but for a last dim cut shorter."""
    place = like.sharding
    spec = [*place.spec, *(None,) * (len(shape) - len(place.spec))]
    if shape[-1:] != like.shape[-1:]:
        spec[-1] = None
    place = jax.NamedSharding(place.mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _blocks(x: jax.Array) -> jax.Array:
    """[..., blocks, values of a block] of the last dim; one block if 64 has no factor
    of 16 or more in common with it."""
    size = math.gcd(x.shape[-1], BLOCK)
    size = size if size >= 16 else x.shape[-1]
    return x.reshape(*x.shape[:-1], -1, size)
