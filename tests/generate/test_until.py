"""Text up to a stop string is what generating all of it and cutting gives."""

import functools

import jax
import numpy as np
import pytest

from jaxinfra import params, precision, sharding
from jaxinfra.config import ModelConfig
from jaxinfra.generate import decode, until
from jaxinfra.mesh import make_mesh
from jaxinfra.models.specs import param_specs

FLOAT32 = precision.policy("float32")
CFG = ModelConfig(
    vocab_size=13, width=8, ffn_width=8, num_heads=2, num_kv_heads=1, repeats=1,
    tied=False, init_std=1.5,
)  # fmt: skip
NEW = 24
PROMPTS = [np.array(ids) for ids in ([1, 2, 3], [5], [4, 4, 2, 9, 7], [8, 8])]
DRAWN = {"temperature": 1.5, "seed": 4}


def to_text(ids):
    return "".join(chr(ord("a") + i) for i in ids)


@functools.cache
def whole(temperature=0.0, seed=0):
    """All new tokens of each prompt, with no stop."""
    generate = decode.make_generate(
        CFG, policy=FLOAT32, layout=layout(), max_new_tokens=NEW, capacity=64,
        temperature=temperature,
    )  # fmt: skip
    prompts_BP = np.zeros((4, 5), int)
    for b, prompt in enumerate(PROMPTS):
        prompts_BP[b, : len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in PROMPTS])
    with jax.set_mesh(layout().mesh):
        return generate(tree(), prompts_BP, lengths_B, jax.random.key(seed)).tokens_BN


@functools.cache
def layout():
    return sharding.make_layout(make_mesh({"fsdp": 2}, devices=jax.devices()[:2]))


@functools.cache
def tree():
    key, dtype = jax.random.key(1), np.float32
    return params.initialize(param_specs(CFG), key, layout=layout(), dtype=dtype)


@functools.cache
def made(stop_ids, limit):
    return until.make_complete(
        CFG,
        policy=FLOAT32,
        layout=layout(),
        to_text=to_text,
        stop_ids=stop_ids,
        max_length=limit,
    )


def complete(
    stops, *, prompts=PROMPTS, stop_ids=(), max_new_tokens=NEW, limit=0, **how
):
    run = made(stop_ids, limit)
    with jax.set_mesh(layout().mesh):
        return run(tree(), prompts, stops, max_new_tokens=max_new_tokens, **how)


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.slow
def test_pieces_give_what_one_call_gives_up_to_the_stop(drawn):
    texts = [to_text(row) for row in whole(**drawn)]
    stops = [[texts[0][19:21]], [texts[1][2]], [], ["", texts[3][20:23], texts[3][18]]]
    expected = [
        text[: min([NEW, *(text.find(s) for s in cut if s and s in text)])]
        for text, cut in zip(texts, stops, strict=True)
    ]
    assert len({len(text) for text in expected}) > 1
    assert complete(stops, **drawn) == expected


def test_a_stop_id_ends_a_text_and_is_no_part_of_it():
    stop = int(whole(**DRAWN)[0, 5])
    for text, row in zip(
        complete([[]] * 4, stop_ids=(stop,), **DRAWN), whole(**DRAWN), strict=True
    ):
        ends = np.flatnonzero(row == stop)
        assert text == to_text(row[: ends[0] if len(ends) else NEW])


@pytest.mark.slow
def test_a_prompt_too_long_loses_its_beginning():
    long = np.concatenate([np.full(50, 3), PROMPTS[2]])
    short = complete([[]], prompts=[long[-30:]], max_new_tokens=10)
    assert complete([[]], prompts=[long], max_new_tokens=10, limit=40) == short
    with pytest.raises(ValueError, match="max_new_tokens=24 leaves no room"):
        complete([[]], prompts=[long], limit=24)
