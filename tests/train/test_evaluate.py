"""The held-out set, whole and once; the last batch filled up; bits a byte."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.data import prepare
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.train import evaluate

LENGTH, ROWS = 6, 4


@pytest.fixture
def split(tmp_path):
    """77 tokens, each another id, so that one read twice shows: 13 rows of 6."""
    ids = np.arange(1, 78, dtype=np.uint16)
    content = prepare.SplitContent(
        documents=[ids[:30], ids[30:61], ids[61:]], text_bytes=154
    )
    dataset = prepare.write_dataset(
        tmp_path / "set",
        tokenizer=ByteTokenizer(),
        splits={"held_out": content},
        shard_tokens=1000,
    )
    return dataset.split("held_out")


def held_out(split, *, batches=0, devices=2):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    rows = jax.NamedSharding(mesh, jax.P("data", None))
    return evaluate.eval_set(
        split, length=LENGTH, batch_size=ROWS, batches=batches, sharding=rows
    )


def targets(batch):
    tokens, segments = map(np.asarray, batch)
    is_target = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return tokens[:, 1:][is_target].tolist()


def test_every_token_is_a_target_once_and_the_last_batch_is_filled_up(split):
    batches = list(held_out(split).batches())
    assert [batch.tokens_BT1.shape for batch in batches] == [(ROWS, LENGTH + 1)] * 4
    seen = [token for batch in batches for token in targets(batch)]
    starts = {1, 31, 62}  # the first of a document follows nothing
    assert sorted(seen) == sorted(set(range(1, 78)) - starts)
    assert not np.asarray(batches[-1].segments_BT1)[1:].any(), (
        "one row, three of filling"
    )


def test_it_can_be_read_again_from_the_start(split):
    held = held_out(split)
    first, second = list(held.batches()), list(held.batches())
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.tokens_BT1, b.tokens_BT1)


def test_at_most_so_many_batches(split):
    assert len(list(held_out(split, batches=2).batches())) == 2
    assert len(list(held_out(split, batches=9).batches())) == 4


def test_loss_is_of_all_tokens_together_and_bits_are_by_bytes_of_text(split):
    def eval_step(params, model_state, batch):
        """A loss of params times the target's id."""
        del model_state
        ids = targets(batch)
        return jnp.float32(params * sum(ids)), jnp.float32(len(ids))

    found = evaluate.evaluate(eval_step, {"bible": held_out(split)}, 0.5, ())
    ids = sorted(set(range(1, 78)) - {1, 31, 62})
    loss = 0.5 * sum(ids) / len(ids)
    assert found["eval/bible/tokens"] == len(ids)
    assert found["eval/bible/loss"] == pytest.approx(loss)
    bytes_per_token = 154 / 77
    bits = loss / math.log(2) / bytes_per_token
    assert found["eval/bible/bits_per_byte"] == pytest.approx(bits)


def test_sums_of_many_tokens_do_not_lose_any():
    """2**24 + 1 is no float32: batches are summed on the host."""
    count = 2.0**24
    held = evaluate.EvalSet(lambda: iter([None, None]), 1.0)
    step = lambda params, model_state, batch: (jnp.float32(0), jnp.float32(count - 1))
    found = evaluate.evaluate(step, {"big": held}, None, ())
    assert found["eval/big/tokens"] == 2 * (count - 1)
