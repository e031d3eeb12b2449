"""What is held out is never trained on: ten epochs of every packing, order, mixture."""

import json
import re

import numpy as np
import pytest

from jaxinfra.data import fitting, prepare, shards
from jaxinfra.data.batches import make_evaluation, make_stream
from jaxinfra.stages import parse

LENGTH, EPOCHS, BATCH_SIZE = 32, 10, 16
DOCUMENTS = 120
LAYOUTS = ["concat", *sorted(fitting.PACKINGS)]


def names_in(batch, tokenizer):
    """The documents of which any whole name stands in the rows."""
    texts = [tokenizer.decode(row) for row in batch.tokens_BT1]
    return set(re.findall(r"\w+\d{3}", " ".join(texts)))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A data set of each layout; a document is its own name, over and over."""
    root = tmp_path_factory.mktemp("sets")
    found = {}
    for number, name in enumerate(LAYOUTS):
        rng = np.random.default_rng(number)
        file = root / f"{name}.jsonl"
        letter = "abcdefg"[number]
        texts = [f"{letter}{d:03d} " * rng.integers(1, 20) for d in range(DOCUMENTS)]
        texts += texts[::7]  # copies, which may not lie on both sides
        file.write_text("\n".join(json.dumps({"text": t}) for t in texts))
        found[name] = prepare.prepare(
            [file],
            root / name,
            tokenizer="byte",
            split="documents",
            held_out=0.2,
            seed=3,
            shard_tokens=2_000,
            layout=shards.Layout(name, 0 if name == "concat" else LENGTH),
        )
    return found


def held_out(data):
    found = set()
    evaluation = make_evaluation(data.split("held_out"), length=LENGTH, batch_size=8)
    for step in range(evaluation.num_batches):
        found |= names_in(evaluation.batch(step), data.tokenizer)
    return found


def trained_on(stream, tokenizer):
    """Names in as many rows as ten times those of all sets together for each set."""
    sets = stream.sources.rows
    rows = EPOCHS * len(sets) * sum(r.num_rows for r in sets)
    found = set()
    for step in range(-(-rows // BATCH_SIZE)):
        found |= names_in(stream.batch(step), tokenizer)
    return found


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_document_that_is_held_out_comes_in_ten_epochs(sets, layout, block):
    data = sets[layout]
    stream = make_stream(
        data.split("train"), length=LENGTH, batch_size=BATCH_SIZE, seed=1, block=block
    )
    out, seen = held_out(data), trained_on(stream, data.tokenizer)
    assert len(out) == DOCUMENTS // 5
    assert not out & seen
    assert len(out | seen) == DOCUMENTS  # nothing but what is held out is left out


def test_no_document_that_is_held_out_comes_in_a_mixture(sets):
    weights = {name: f"{n + 1} {5 - n}@50" for n, name in enumerate(sets)}
    stream = make_stream(
        {name: data.split("train") for name, data in sets.items()},
        length=LENGTH,
        batch_size=BATCH_SIZE,
        seed=1,
        ramp="8 16@20",
        weights={name: parse(text, key=name) for name, text in weights.items()},
    )
    out = set().union(*map(held_out, sets.values()))
    seen = trained_on(stream, sets["concat"].tokenizer)
    assert not out & seen
    assert len(out | seen) == DOCUMENTS * len(sets)
