"""The held-out set, whole and once; the last batch filled up; bits a byte."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import tiny_runs

from jaxinfra import experiment
from jaxinfra.data import device, writer
from jaxinfra.data.batches import make_evaluation, make_stream
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.train import evaluate
from jaxinfra.train.objective import Aux

LENGTH, ROWS = 6, 4


@pytest.fixture
def split(tmp_path):
    """77 tokens, each another id, so that one read twice shows: 13 rows of 6."""
    ids = np.arange(1, 78, dtype=np.uint16)
    content = writer.SplitContent(
        documents=[ids[:30], ids[30:61], ids[61:]], text_bytes=154
    )
    dataset = writer.write_dataset(
        tmp_path / "set",
        tokenizer=ByteTokenizer(),
        splits={"held_out": content},
        shard_tokens=1000,
    )
    return dataset.split("held_out")


def held_out(split, *, batches=0, devices=2):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    rows = jax.NamedSharding(mesh, jax.P("data", None))
    whole = make_evaluation(split, length=LENGTH, batch_size=ROWS)
    return evaluate.eval_set(whole, batches=batches, sharding=rows)


def sums(loss_sum, weight_sum, **metrics):
    metrics = {name: jnp.float32(value) for name, value in metrics.items()}
    return jnp.float32(loss_sum), Aux(jnp.float32(weight_sum), metrics)


def targets(batch):
    tokens, segments = map(np.asarray, batch.per_token[:2])
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
        return sums(params * sum(ids), len(ids), even=sum(i % 2 == 0 for i in ids))

    found = evaluate.evaluate(eval_step, {"bible": held_out(split)}, 0.5, ())
    ids = sorted(set(range(1, 78)) - {1, 31, 62})
    loss = 0.5 * sum(ids) / len(ids)
    assert found["eval/bible/tokens"] == len(ids)
    assert found["eval/bible/loss"] == pytest.approx(loss)
    bytes_per_token = 154 / 77
    bits = loss / math.log(2) / bytes_per_token
    assert found["eval/bible/bits_per_byte"] == pytest.approx(bits)
    even = sum(i % 2 == 0 for i in ids) / len(ids)
    assert found["eval/bible/even"] == pytest.approx(even)


def test_sums_of_many_tokens_do_not_lose_any():
    """2**24 + 1 is no float32: batches are summed on the host."""
    count = 2.0**24
    held = evaluate.EvalSet(lambda: iter([None, None]), None)
    step = lambda params, model_state, batch: sums(0, count - 1)
    found = evaluate.evaluate(step, {"big": held}, None, ())
    assert found["eval/big/tokens"] == 2 * (count - 1)
    assert "eval/big/bits_per_byte" not in found  # what is predicted is no text


@pytest.mark.slow
def test_labels_are_smoothed_in_training_alone(tmp_path):
    data = tiny_runs.write_documents(tmp_path / "set")
    losses = {}
    for smoothing in (0.0, 0.3):
        config = tiny_runs.tiny()
        settings = {"batch_size": 2, "length": 9, "label_smoothing": smoothing}
        train = dataclasses.replace(config.train, **settings)
        model = dataclasses.replace(config.model, width=32, ffn_width=48)
        config = dataclasses.replace(config, train=train, model=model)
        built = tiny_runs.build(config, data)
        stream = make_stream(data.split("train"), length=9, batch_size=2, seed=0)
        with jax.set_mesh(built.layout.mesh):
            rows = experiment.batch_sharding(built.layout)
            batch = device.to_device(stream.batch, 0, batch_size=2, sharding=rows)
            state = built.init()
            total, aux = built.eval_step(state.params, state.model_state, batch)
            evaluated = float(total) / float(aux.weight_sum)
            step = built.train_step.lower(state, batch).compile(tiny_runs.QUICK)
            trained = float(step(state, batch)[1]["loss"])
        losses[smoothing] = evaluated, trained
    assert losses[0.3][0] == losses[0.0][0]
    assert losses[0.0][0] == pytest.approx(losses[0.0][1], rel=1e-6)
    assert losses[0.3][1] != pytest.approx(losses[0.0][1], rel=1e-3)
