"""FLOPs of a token against sums done by hand."""

import dataclasses

import pytest

from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.models import transformer
from jaxinfra.train import facts

MODEL = ModelConfig(
    vocab_size=11,
    width=4,
    ffn_width=6,
    num_heads=2,
    num_kv_heads=1,
    repeats=3,
    tied=False,
)


def per_token(model, length):
    specs = transformer.param_specs(model)
    return facts.train_flops_per_token(model, specs, length=length)


def test_a_small_model_by_hand():
    # Query 4 x 4, key and value 4 x 2 each, out 4 x 4, three of 4 x 6; two norms of 4.
    layer = 16 + 8 + 8 + 16 + 72 + 8
    multiplied = 3 * layer + 4 + 11 * 4  # final norm, head
    # Scores and values: 2 products x 2 heads x width 2 x 2 FLOP, by 8 / 2 keys seen,
    # forward once and backward twice.
    attention = 3 * (2 * 2 * 2 * 2 * 4) * 3
    assert per_token(MODEL, 8) == 6 * multiplied + attention


def test_a_tied_table_counts_as_the_head():
    tied = dataclasses.replace(MODEL, tied=True)
    assert per_token(tied, 8) == per_token(MODEL, 8)


def test_a_window_is_seen_and_not_more():
    windowed = dataclasses.replace(MODEL, pattern=(LayerConfig(window=2),))
    # Of 8 queries the first sees 1/2 by the same halving, the others a window of 2.
    saved = 12 * 2 * 2 * 3 * (4 - (2 - 4 / 16))
    assert per_token(MODEL, 8) - per_token(windowed, 8) == pytest.approx(saved)


def test_a_window_longer_than_the_row_changes_nothing():
    windowed = dataclasses.replace(MODEL, pattern=(LayerConfig(window=64),))
    assert per_token(windowed, 8) == per_token(MODEL, 8)
