"""Sampling keeps the tokens it should and draws them as often as it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.generate import sample

B, V = 7, 13


@pytest.fixture
def logits_BV() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (B, V)).astype(np.float32)


def keys(count: int, seed: int = 0) -> jax.Array:
    rows = jnp.arange(count)
    return sample.row_keys(jax.random.key(seed), rows, jnp.full_like(rows, 5))


def kept_by_oracle(logits_V: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Ids in falling order until `top_p` of the first `top_k`'s probability is held."""
    order = np.argsort(-logits_V)[: top_k or None]
    probs = np.exp(logits_V[order].astype(np.float64))
    kept, held = [], 0.0
    for token, prob in zip(order, probs / probs.sum(), strict=True):
        if held < top_p:
            kept.append(int(token))
        held += prob
    return set(kept)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (5, 0.8), (99, 0.1), (1, 0.5)]
)
def test_top_k_and_top_p_keep_what_the_oracle_keeps(logits_BV, top_k, top_p):
    kept_BV = np.asarray(sample.keep_top(logits_BV, top_k=top_k, top_p=top_p))
    for kept_V, logits_V in zip(kept_BV, logits_BV, strict=True):
        kept = set(np.flatnonzero(np.isfinite(kept_V)).tolist())
        assert kept == kept_by_oracle(logits_V, top_k, top_p)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1e-30},
                                      {"top_k": 1}, {"top_p": 1e-9}])  # fmt: skip
def test_the_narrowest_settings_are_greedy(logits_BV, settings):
    drawn_B = sample.sample(jnp.asarray(logits_BV), keys(B), **settings)
    np.testing.assert_array_equal(drawn_B, logits_BV.argmax(axis=-1))


def test_tokens_come_as_often_as_their_probability():
    rows, temperature = 20_000, 0.7
    logits_V = jnp.array([0.0, 1.0, -0.5, 0.3, -4.0])
    drawn = sample.sample(
        jnp.tile(logits_V, (rows, 1)), keys(rows), temperature=temperature, top_k=3
    )
    shares = np.bincount(drawn, minlength=5) / rows
    weights = np.exp(np.array([0.0, 1.0, -np.inf, 0.3, -np.inf]) / temperature)
    four_sigma = 4 * 0.5 / np.sqrt(rows)
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=four_sigma)


def test_a_draw_depends_on_seed_row_and_position_alone(logits_BV):
    draw = jax.vmap(lambda key: jax.random.bits(key))
    key, rows = jax.random.key(1), jnp.array([4, 4, 9])
    bits = draw(sample.row_keys(key, rows, jnp.array([2, 3, 2])))
    assert len(set(bits.tolist())) == 3
    swapped = draw(sample.row_keys(key, rows[::-1], jnp.array([2, 3, 2])))
    np.testing.assert_array_equal(swapped[jnp.array([2, 1, 0])], bits)
    one = sample.sample(jnp.asarray(logits_BV[2:3]), keys(B)[2:3], temperature=2.0)
    whole = sample.sample(jnp.asarray(logits_BV), keys(B), temperature=2.0)
    assert one[0] == whole[2]
