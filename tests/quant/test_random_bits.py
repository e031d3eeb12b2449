"""Chances: each is used once, and neighbours tell nothing of each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.quant import random_bits

X = jnp.zeros((64, 96))


def bits(seed, rows=None):
    return np.asarray(random_bits.bits_like(X, jnp.uint32(seed), rows)).ravel()


@pytest.mark.parametrize("has_rows", [True, False])
def test_neighbouring_seeds_share_no_bits(has_rows):
    """Turn 1 of a row once had the chances of turn 0 of the next."""
    rows = jnp.arange(64, dtype=jnp.uint32) if has_rows else None
    first, second = bits(10, rows), bits(11, rows)
    # Of 6,144 words of 32 bits 0.004 pairs are equal by chance.
    assert len(np.unique(np.concatenate([first, second]))) > 2 * X.size - 3
    for bit in range(32):
        a, b = first >> bit & 1, second >> bit & 1
        assert abs(np.mean(a == b) - 0.5) < 5 * 0.5 / X.size**0.5
        assert abs(np.mean(a) - 0.5) < 5 * 0.5 / X.size**0.5


def test_a_row_has_its_chances_wherever_it_stands():
    rows = jnp.arange(64, dtype=jnp.uint32)
    there = np.asarray(random_bits.bits_like(X, jnp.uint32(3), rows))
    here = np.asarray(random_bits.bits_like(X, jnp.uint32(3), rows[::-1]))
    np.testing.assert_array_equal(there, here[::-1])
