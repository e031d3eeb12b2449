"""Generation with caches says what the model says without them, on every mesh."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra import params, precision, sharding
from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.generate import decode
from jaxinfra.mesh import make_mesh
from jaxinfra.models import transformer
from jaxinfra.ops import attention, seam
from jaxinfra.ops.seam import Context, Ops

FLOAT32 = precision.policy("float32")
LLAMA = ModelConfig(
    vocab_size=29,
    width=16,
    ffn_width=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    prefix=(LayerConfig(window=3),),
    pattern=(LayerConfig(window=4, rope_theta=100.0), LayerConfig()),
    repeats=2,
    suffix=(LayerConfig(),),
    attention_softcap=5.0,
    logit_softcap=20.0,
    qk_norm="head",
    tied=False,
)
GPT2 = ModelConfig(
    vocab_size=257,
    width=16,
    ffn_width=24,
    num_heads=2,
    num_kv_heads=2,
    repeats=2,
    norm="layernorm",
    positions="learned",
    max_length=20,
    activation="gelu_tanh",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
LENGTHS = np.array([5, 1, 9])
NEW = 8
CAPACITY = 18
KEY = jax.random.key(3)
DRAW = {"temperature": 1.5, "top_k": 15, "top_p": 0.95, "vocab_size": 17}


class Setting(NamedTuple):
    """Parameters where they live, and a model that has no cache."""

    cfg: ModelConfig
    layout: sharding.Layout
    tree: params.Tree
    model: transformer.Model

    def generate(self, prompts_BP, lengths_B, rows_B=None, **settings):
        settings = {"capacity": CAPACITY, "max_new_tokens": NEW, **settings}
        generate = made(self.cfg, self.layout, **settings)
        with jax.set_mesh(self.layout.mesh):
            return generate(self.tree, prompts_BP, lengths_B, KEY, rows_B)


@functools.cache
def made(cfg: ModelConfig, layout: sharding.Layout, **settings) -> decode.Generate:
    return decode.make_generate(cfg, policy=FLOAT32, layout=layout, **settings)


@functools.cache
def setting(cfg: ModelConfig, **sizes: int) -> Setting:
    mesh = make_mesh(sizes, devices=jax.devices()[: int(np.prod([*sizes.values()]))])
    layout = sharding.make_layout(mesh)
    rules = layout.params
    ops = Ops(seam.make_einsum(FLOAT32, rules), attention.make_attend(rules))
    model = transformer.make_model(cfg, ops=ops, policy=FLOAT32, rules=rules)
    random = np.random.default_rng(7)

    def make(spec: params.ParamSpec, place: jax.sharding.NamedSharding) -> jax.Array:
        """Wide, lest the model repeats its last token; no bias is 0, no scale 1."""
        fan_in = np.prod([spec.shape[dim] for dim in spec.contract])
        x = random.normal(spec.kind == "vector", 3 / fan_in**0.5, spec.shape)
        target = params.physical_shape(spec, layout)
        pad = [(0, big - small) for big, small in zip(target, spec.shape, strict=True)]
        x = np.pad(x.astype(np.float32), pad, constant_values=9)  # must not show
        return jax.device_put(x, place)

    places = params.shardings(model.specs, layout, rules)
    return Setting(cfg, layout, jax.tree.map(make, model.specs, places), model)


@functools.cache
def prompts(vocab_size: int, shape=(3, 9)) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, shape)


@functools.cache
def uncached(cfg: ModelConfig) -> np.ndarray:
    """Greedy tokens by a whole forward pass for each, row by row."""
    case = setting(cfg)
    rows = sharding.spec(case.layout.params, "batch", "length")

    @jax.jit
    def next_token(tree, tokens_1T, last):
        tokens_1T = jax.reshard(tokens_1T, rows)
        context = Context(jax.reshard(jnp.arange(CAPACITY)[None], rows))
        h_BTD, head_VD, _ = case.model.forward(tree, tokens_1T, context)
        h_D, head_VD = jax.reshard((h_BTD[0, last], head_VD), jax.P())
        return jnp.argmax(head_VD @ h_D)  # a softcap does not change the order

    generated = []
    with jax.set_mesh(case.layout.mesh):
        for row, length in zip(prompts(cfg.vocab_size), LENGTHS, strict=True):
            tokens_1T = np.zeros((1, CAPACITY), np.int32)
            tokens_1T[0, :length] = row[:length]
            for at in range(length, length + NEW):
                tokens_1T[0, at] = next_token(case.tree, tokens_1T, at - 1)
            generated.append(tokens_1T[0, length : length + NEW])
    return np.array(generated)


def garbled(prompts_BP: np.ndarray) -> np.ndarray:
    """The same prompts with other padding."""
    is_pad_BP = np.arange(prompts_BP.shape[1]) >= LENGTHS[:, None]
    return np.where(is_pad_BP, 2, prompts_BP)


@pytest.mark.parametrize("cfg", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_cached_tokens_are_those_of_whole_forward_passes(cfg):
    generated = setting(cfg).generate(prompts(cfg.vocab_size), LENGTHS)
    assert len(np.unique(generated.tokens_BN)) > 5  # else nothing is tested
    np.testing.assert_array_equal(generated.tokens_BN, uncached(cfg))
    np.testing.assert_array_equal(generated.lengths_B, [NEW] * 3)


@pytest.mark.slow
def test_layers_run_as_a_loop_or_flat_say_the_same():
    flat = setting(LLAMA).generate(prompts(29), LENGTHS, unroll=True)
    np.testing.assert_array_equal(flat.tokens_BN, uncached(LLAMA))


@pytest.mark.slow
def test_a_mesh_says_what_one_device_says():
    sizes = {"fsdp": 2, "tensor": 2, "context": 2}
    split = setting(LLAMA, **sizes).generate(garbled(prompts(29)), LENGTHS)
    np.testing.assert_array_equal(split.tokens_BN, uncached(LLAMA))


@pytest.mark.slow
def test_what_is_drawn_depends_on_no_mesh_neighbour_or_padding():
    generate = setting(LLAMA).generate
    drawn = generate(prompts(29), LENGTHS, **DRAW)
    again = generate(garbled(prompts(29)), LENGTHS, **DRAW)
    np.testing.assert_array_equal(drawn.tokens_BN, again.tokens_BN)
    split = setting(LLAMA, fsdp=2, tensor=2).generate(prompts(29), LENGTHS, **DRAW)
    np.testing.assert_array_equal(drawn.tokens_BN, split.tokens_BN)
    turned = [2, 0, 0]
    rows_B = np.array([2, 0, 1])  # the last: prompt 0, drawn as row 1
    other = generate(prompts(29)[turned], LENGTHS[turned], rows_B, **DRAW)
    np.testing.assert_array_equal(drawn.tokens_BN[[2, 0]], other.tokens_BN[:2])
    assert (other.tokens_BN[1] != other.tokens_BN[2]).any()


def test_after_a_stop_token_comes_padding():
    whole = uncached(LLAMA)
    stop = int(whole[0, 2])
    generated = setting(LLAMA).generate(prompts(29), LENGTHS, stop_ids=(stop, 100))
    for row, expected, length in zip(
        generated.tokens_BN, whole, generated.lengths_B, strict=True
    ):
        stops = np.flatnonzero(expected == stop)
        assert length == (stops[0] + 1 if len(stops) else NEW)
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert (row[length:] == decode.PADDING).all()
    assert generated.lengths_B.min() < NEW


def test_ids_beyond_the_tokenizer_are_never_chosen():
    tokens_BN = setting(LLAMA).generate(prompts(29), LENGTHS, **DRAW).tokens_BN
    assert 0 <= tokens_BN.min() <= tokens_BN.max() < 17
    assert uncached(LLAMA).max() >= 17


def test_text_goes_in_and_comes_out():
    case, tokenizer = setting(GPT2), ByteTokenizer()
    with jax.set_mesh(case.layout.mesh):
        generate = decode.make_generate(
            GPT2, policy=FLOAT32, layout=case.layout, max_new_tokens=4, capacity=10
        )
        run = functools.partial(
            decode.generate_text, case.tree, generate=generate, key=KEY
        )
        texts = run(["", "ab", "abcdef"], tokenizer)
        assert run(["ab", "abcdef", ""], tokenizer) == texts[1:] + texts[:1]
        eod_B1 = np.full((3, 1), tokenizer.eod_id)
        tokens_BN, _ = generate(case.tree, eod_B1, np.ones(3, int), KEY)
        assert tokenizer.decode(tokens_BN[1]) == texts[0]
        assert run([], tokenizer) == []
        with pytest.raises(
            ValueError, match=r"7 tokens.*capacity - max_new_tokens = 6"
        ):
            run(["abcdefg"], tokenizer)
        with pytest.raises(ValueError, match=r"at least 1; got lengths"):
            generate(case.tree, eod_B1, np.array([1, 0, 1]), KEY)
        with pytest.raises(ValueError, match=r"from 300 to 300"):
            generate(case.tree, np.array([[300]]), np.array([1]), KEY)


def test_learned_positions_bound_the_capacity():
    with pytest.raises(ValueError, match=r"model.max_length=20"):
        setting(GPT2).generate(prompts(257), LENGTHS, capacity=21)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        setting(GPT2).generate(prompts(257), LENGTHS, max_new_tokens=0)
