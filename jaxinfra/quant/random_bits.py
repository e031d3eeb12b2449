"""Random bits for rounding by chance: a hash of a counter, the same on every mesh."""

import jax
import jax.numpy as jnp


def mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32 of which every output bit hangs on every input bit.

    Source: github.com/skeeto/hash-prospector, two multiplications of bias 0.11.
    """
    h = (h ^ (h >> 16)) * jnp.uint32(0x21F0AAAD)
    h = (h ^ (h >> 15)) * jnp.uint32(0xD35A2D97)
    return h ^ (h >> 15)


def bits_like(
    x: jax.Array, seed: jax.Array, rows: jax.Array | None = None
) -> jax.Array:
    """uint32 of x's shape, and laid out as it is, by each element's place in the global
    array. `rows`, uint32 of its first dim, count as the places along that."""
    spec = jax.typeof(x).sharding.spec
    # A sharding is said where there is one: without a mesh, or on Auto axes, is none.
    place = spec if any(entry is not None for entry in spec) else None
    seed, index, stride = mix(seed), jnp.uint32(0), 1  # neighbours' bits are others
    for dim in reversed(range(x.ndim)):
        if dim == 0 and rows is not None:
            # By itself: rows x stride would wrap and meet other rows' places.
            seed = mix(rows + seed).reshape(-1, *(1,) * (x.ndim - 1))
            break
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim, out_sharding=place)
        index += along * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim]
    return mix(index ^ seed)
