"""A digest of a batch as it has arrived on the devices; for train.log_batch_digest."""

import jax
import jax.numpy as jnp


def digest(batch: tuple) -> jax.Array:
    """uint32 sum over all elements of a hash of (index, values), index by dims.

    Arrays of one shape are hashed together: of packed rows, (row, column, token,
    segment), and the weight where there is one. To be called inside jit: indices are
    those of the global arrays, so that a row on the wrong device, or two rows
    exchanged, changes it. Wraps modulo 2**32, so equal on every mesh.
    """
    by_shape: dict[tuple[int, ...], list[jax.Array]] = {}
    for array in getattr(batch, "per_token", batch):
        if array is not None:
            by_shape.setdefault(array.shape, []).append(array)
    total = jnp.uint32(0)
    for number, (shape, arrays) in enumerate(by_shape.items()):
        sharding = jax.typeof(arrays[0]).sharding
        rows, *dims = (
            jax.lax.broadcasted_iota(jnp.uint32, shape, dim, out_sharding=sharding)
            for dim in range(len(shape))
        )
        hashes = _mix(rows + jnp.uint32(0x9E3779B9 + number))
        for values in (*dims, *arrays):
            hashes = _mix(hashes + values.astype(jnp.uint32))
        total += jnp.sum(hashes, dtype=jnp.uint32)
    return total


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32. Source: MurmurHash3's fmix32, A. Appleby, 2011."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
