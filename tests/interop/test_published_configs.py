"""The config.json of published checkpoints, and of files that lack or hide a field."""

import dataclasses
import itertools
import json
import pathlib

import pytest

from jaxinfra.config import (
    ConfigError,
    DataError,
    LayerConfig,
    ModelConfig,
    RopeScaling,
)
from jaxinfra.interop import families, hf_config, same_model

FOLDER = pathlib.Path(__file__).parent / "published_configs"


def fields_of(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def read(name: str, without: tuple[str, ...] = (), **changed) -> ModelConfig:
    fields = fields_of(name) | changed
    return hf_config.read_config(
        {field: value for field, value in fields.items() if field not in without}
    )


def is_same(a: ModelConfig, b: ModelConfig) -> bool:
    return (
        same_model.differences(a, b) == []
        and (a.vocab_size, a.max_length) == (b.vocab_size, b.max_length)
        and a.residual_scale_init == b.residual_scale_init
    )


def all_of(num_layers: int, **layer) -> dict:
    return {"pattern": (LayerConfig(**layer),), "repeats": num_layers}


def sizes(vocab_size, width, ffn_width, num_heads, num_kv_heads, max_length) -> dict:
    return {
        "vocab_size": vocab_size,
        "width": width,
        "ffn_width": ffn_width,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "max_length": max_length,
        "residual_scale_init": False,
    }


SMOLLM2 = ModelConfig(
    **sizes(49152, 576, 1536, 9, 3, 8192),
    **all_of(30),
    norm_eps=1e-5,
    rope_theta=1e5,
)
GEMMA = ModelConfig(
    **sizes(256_000, 2048, 16384, 8, 1, 8192),
    **all_of(18),
    head_dim=256,
    norm_from_zero=True,
    embedding_scale=True,
    activation="geglu",
)
GEMMA_2 = dataclasses.replace(
    GEMMA,
    **sizes(256_000, 2304, 9216, 8, 4, 8192),
    pattern=(LayerConfig(window=4096), LayerConfig()),
    repeats=13,
    norm_placement="both",
    attention_scale_dim=256,
    attention_softcap=50.0,
    logit_softcap=30.0,
)
LOCAL = LayerConfig(window=512, rope_theta=1e4)
GEMMA_3 = dataclasses.replace(
    GEMMA,
    **sizes(262_144, 1152, 6912, 4, 1, 32768),
    pattern=(LOCAL, LOCAL, LOCAL, LOCAL, LOCAL, LayerConfig()),
    repeats=4,
    suffix=(LOCAL, LOCAL),
    norm_placement="both",
    qk_norm="head",
    attention_scale_dim=256,
    rope_theta=1e6,
)
MISTRAL = ModelConfig(
    **sizes(32_000, 4096, 14336, 32, 8, 32768),
    **all_of(32, window=4096),
    norm_eps=1e-5,
    tied=False,
)
GPT2 = ModelConfig(
    **sizes(50257, 768, 3072, 12, 12, 1024),
    **all_of(12),
    norm="layernorm",
    norm_eps=1e-5,
    positions="learned",
    activation="gelu_tanh",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
MODELS = {
    "smollm2-135m": SMOLLM2,
    "smollm2-135m-instruct": SMOLLM2,
    "llama-2-7b-hf": ModelConfig(
        **sizes(32_000, 4096, 11008, 32, 32, 4096),
        **all_of(32),
        norm_eps=1e-5,
        tied=False,
    ),
    "llama-3.2-1b": ModelConfig(
        **sizes(128_256, 2048, 8192, 32, 8, 131_072),
        **all_of(16),
        norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=RopeScaling(
            kind="llama3", factor=32, low_freq=1, high_freq=4, original_length=8192
        ),
    ),
    "mistral-7b-v0.1": MISTRAL,
    "mistral-7b-v0.3": dataclasses.replace(
        MISTRAL, **all_of(32), rope_theta=1e6, vocab_size=32768
    ),
    "qwen2.5-0.5b": ModelConfig(
        **sizes(151_936, 896, 4864, 14, 2, 32768),
        **all_of(24),
        rope_theta=1e6,
        qkv_bias=True,
    ),
    "qwen3-0.6b": ModelConfig(
        **sizes(151_936, 1024, 3072, 16, 8, 40960),
        **all_of(28),
        head_dim=128,
        rope_theta=1e6,
        qk_norm="head",
    ),
    "qwen3-30b-a3b": ModelConfig(
        **sizes(151_936, 2048, 6144, 32, 4, 40960),
        **all_of(48, feed_forward="experts"),
        head_dim=128,
        rope_theta=1e6,
        qk_norm="head",
        tied=False,
        num_experts=128,
        experts_per_token=8,
        expert_ffn_width=768,
    ),
    "gemma-2b": GEMMA,
    "gemma-2-2b": GEMMA_2,
    "gemma-2-9b": dataclasses.replace(
        GEMMA_2, **sizes(256_000, 3584, 14336, 16, 8, 8192), repeats=21
    ),
    "gemma-3-1b-pt": GEMMA_3,
    "gemma-3-270m": dataclasses.replace(
        GEMMA_3, **sizes(262_144, 640, 2048, 4, 1, 32768), repeats=3, suffix=()
    ),
    "olmo-2-0425-1b": ModelConfig(
        **sizes(100_352, 2048, 8192, 16, 16, 4096),
        **all_of(16),
        rope_theta=5e5,
        norm_placement="post",
        qk_norm="all",
        tied=False,
    ),
    "phi-3-mini-4k-instruct": ModelConfig(
        **sizes(32064, 3072, 8192, 32, 32, 4096),
        **all_of(32, window=2047),
        norm_eps=1e-5,
        tied=False,
    ),
    "mixtral-8x7b-v0.1": ModelConfig(
        **sizes(32_000, 4096, 14336, 32, 8, 32768),
        **all_of(32, feed_forward="experts"),
        norm_eps=1e-5,
        rope_theta=1e6,
        tied=False,
        num_experts=8,
        experts_per_token=2,
    ),
    "gpt2": GPT2,
    "gpt2-medium": dataclasses.replace(
        GPT2, **sizes(50257, 1024, 4096, 16, 16, 1024), repeats=24
    ),
    "gpt2-xl": dataclasses.replace(
        GPT2, **sizes(50257, 1600, 6400, 25, 25, 1024), repeats=48
    ),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.iterdir()))
def test_a_published_config_gives_its_model(name):
    model = read(name)
    assert same_model.differences(model, MODELS[name]) == []
    assert is_same(model, MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_written_as_its_family_and_keeps_its_length(name):
    fields, model = fields_of(name), read(name)
    written = hf_config.write_config(model, fields["model_type"])
    assert is_same(hf_config.read_config(written), model)
    assert hf_config.read_config(written).max_length == model.max_length > 0


def change(**fields) -> dict:
    return fields


LLAMA, QWEN2, MOE = "llama-3.2-1b", "qwen2.5-0.5b", "qwen3-30b-a3b"
PLAIN = "llama-2-7b-hf"  # without scaling
GEMMA3 = "gemma-3-1b-pt"
FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = {"rope_type": "linear", "factor": 8.0}

# Fields that say what is so without them.
NEUTRAL = [
    ("mistral-7b-v0.3", change(attention_bias=False, mlp_bias=False)),
    ("mistral-7b-v0.1", change(layer_types=[SLIDING] * 32, use_sliding_window=True)),
    (QWEN2, change(attention_bias=False, head_dim=64)),
    ("phi-3-mini-4k-instruct", change(head_dim=96, partial_rotary_factor=1.0)),
    ("olmo-2-0425-1b", change(head_dim=128)),
    (PLAIN, change(layer_types=[FULL] * 32, use_sliding_window=False)),
    (PLAIN, change(rope_parameters={"rope_type": "default", "rope_theta": 10000})),
    (PLAIN, change(rope_scaling={}, sliding_window=None, max_window_layers=28)),
    (LLAMA, change(original_max_position_embeddings=8192)),
    (MOE, change(num_local_experts=128, layer_types=[FULL] * 48)),
    ("gpt2", change(hidden_size=768, n_inner=3072)),
    ("gemma-2b", change(hidden_activation="gelu_pytorch_tanh")),
    (GEMMA3, change(hidden_act="gelu", sliding_window_pattern=6)),
    ("gemma-2-2b", change(sliding_window_pattern=2, _sliding_window_pattern=2)),
    (PLAIN, change(unsloth_fixed=True, temperature=0.6, pruned_heads={})),
]


@pytest.mark.parametrize(("name", "fields"), NEUTRAL, ids=str)
def test_a_field_that_changes_nothing_passes(name, fields):
    assert is_same(read(name, **fields), MODELS[name])


# What would change the function and is not what the family computes.
REFUSED = [
    ("smollm2-135m", change(rope_interleaved=True), "rope_interleaved=True"),
    ("smollm2-135m", change(is_llama_config=False), "is_llama_config=False"),
    (QWEN2, change(use_mrope=True), "use_mrope=True"),
    (QWEN2, change(attention_bias=True), "attention_bias=True"),
    ("gemma-2-9b", change(sliding_window_size=2048), "sliding_window_size=2048"),
    ("gemma-2-2b", change(hidden_activation="gelu"), "hidden_activation='gelu'"),
    ("gemma-2-2b", change(hidden_act="relu"), "hidden_act='relu'"),
    ("gemma-2-2b", change(sliding_window_pattern=3), "sliding_window_pattern=3"),
    ("gemma-2b", change(hidden_activation="gelu"), "hidden_activation='gelu'"),
    ("mistral-7b-v0.3", change(attention_bias=True), "attention_bias=True"),
    ("mistral-7b-v0.3", change(attention_bias=0), "attention_bias=0"),
    ("mistral-7b-v0.1", change(use_sliding_window=False), "use_sliding_window=False"),
    ("mistral-7b-v0.1", change(layer_types=[FULL] * 32), "layer_types="),
    ("mistral-7b-v0.1", change(max_window_layers=3), "max_window_layers=3"),
    (PLAIN, change(layer_types=[SLIDING] * 32), "layer_types="),
    (PLAIN, change(use_sliding_window=True), "use_sliding_window=True"),
    (PLAIN, change(sliding_window=4096), "sliding_window=4096 .* must be absent"),
    (PLAIN, change(mlp_only_layers=[1]), "mlp_only_layers"),
    (PLAIN, change(decoder_sparse_step=2), "decoder_sparse_step=2"),
    (PLAIN, change(rope_local_base_freq=1e4), "'rope_local_base_freq' of a llama"),
    (PLAIN, change(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (PLAIN, change(rope_scaling={"factor": 8.0}), "'factor' of a rope_scaling of rope"),
    (PLAIN, change(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type='dyn"),
    ("phi-3-mini-4k-instruct", change(rope_scaling=LINEAR), "rope_type='linear'"),
    ("gpt2", change(scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx=True"),
    ("gpt2", change(scale_attn_weights=False), "scale_attn_weights=False"),
    ("gpt2", change(rope_theta=1e4), "'rope_theta' of a gpt2"),
    (GEMMA3, change(use_bidirectional_attention=True), "use_bidirectional_attention"),
    (GEMMA3, change(rope_parameters={"rope_theta": 1e6}), "'rope_theta' of a rope_par"),
    (MOE, change(layer_types=[SLIDING] * 48), "layer_types="),
    (
        MOE,
        change(use_sliding_window=True, sliding_window=128, max_window_layers=3),
        "max_window_layers=3",
    ),
    (QWEN2, change(layer_types=["chunked_attention"] * 24), "layer_types="),
    (LLAMA, change(quantization_config={"bits": 4}), "'quantization_config'"),
    (LLAMA, change(original_max_position_embeddings=4096), "original_max_position"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED, ids=str)
def test_a_field_that_would_change_the_function_is_refused_by_name(
    name, fields, message
):
    with pytest.raises(ConfigError, match=message) as raised:
        read(name, **fields)
    assert str(raised.value).startswith("config.json: ")


# What no such file says: of another type, contradicting another field, incomplete.
DAMAGED = [
    (PLAIN, change(hidden_size="32"), "hidden_size='32' must be a whole number from 1"),
    (PLAIN, change(hidden_size=32.0), "hidden_size=32.0 must be a whole number"),
    (PLAIN, change(hidden_size=True), "hidden_size=True must be a whole number"),
    (PLAIN, change(num_hidden_layers=0), "num_hidden_layers=0 must be a whole number"),
    (PLAIN, change(num_hidden_layers=10**9), "num_hidden_layers=10+ must be"),
    (PLAIN, change(num_attention_heads=0), "num_attention_heads=0 must be"),
    (PLAIN, change(vocab_size=2**31), "vocab_size=2147483648 must be"),
    (PLAIN, change(rope_parameters=[]), r"rope_parameters=\[\] must be an object"),
    (PLAIN, change(rope_scaling="linear"), "rope_scaling='linear' must be an object"),
    (PLAIN, change(rope_theta=None), "rope_theta=None must be a number above 0"),
    (PLAIN, change(rope_theta="1e4"), "rope_theta='1e4' must be a number above 0"),
    (PLAIN, change(model_type=["llama"]), r"model_type=\['llama'\] must be a text"),
    (PLAIN, change(rms_norm_eps="1e-6"), "rms_norm_eps='1e-6' must be a number above"),
    (PLAIN, change(rms_norm_eps=float("nan")), "rms_norm_eps=nan must be a number"),
    (PLAIN, change(hidden_act=[]), r"hidden_act=\[\] must be a text"),
    (PLAIN, change(tie_word_embeddings="false"), "='false' must be true or false"),
    (PLAIN, change(attention_bias=None), "attention_bias=None must be true or false"),
    (PLAIN, change(max_position_embeddings=-1), "max_position_embeddings=-1 must be"),
    ("mistral-7b-v0.1", change(sliding_window=-1), "sliding_window=-1 must be a whole"),
    ("mistral-7b-v0.1", change(sliding_window=0), "sliding_window=0 must be a whole"),
    ("qwen3-0.6b", change(head_dim=None), "head_dim=None must be a whole number"),
    (QWEN2, change(layer_types=1), "layer_types=1 must be a list of texts"),
    (QWEN2, change(layer_types=[1] * 24), "must be a list of texts"),
    (QWEN2, change(use_sliding_window=1), "use_sliding_window=1 must be true or false"),
    (MOE, change(num_experts_per_tok=999), "num_experts_per_tok=999 is above num_exp"),
    (MOE, change(decoder_sparse_step=0), "decoder_sparse_step=0 must be a whole"),
    (MOE, change(mlp_only_layers=1), "mlp_only_layers=1 must be a list of layers"),
    (MOE, change(mlp_only_layers=[48]), r"mlp_only_layers=\[48\] must be .* below 48"),
    ("gpt2", change(n_inner="3072"), "n_inner='3072' must be a whole number"),
    # Contradictions.
    (
        PLAIN,
        change(num_attention_heads=5, num_key_value_heads=2),
        "num_key_value_heads=2 does not divide num_attention_heads=5; set num_key_value"
        "_heads to one of 1, 5, or restore the file",
    ),
    (PLAIN, change(hidden_size=4095), "num_attention_heads=32 does not divide hidden_"),
    (LLAMA, change(head_dim=63), "a head of width 63 is odd"),
    (MOE, change(num_local_experts=64), "num_local_experts=64 and num_experts=128"),
    ("mixtral-8x7b-v0.1", change(num_experts=4), "num_experts=4 and num_local_expert"),
    ("gpt2", change(hidden_size=1024), "hidden_size=1024 and n_embd=768"),
    (QWEN2, change(layer_types=[SLIDING] * 24), "sliding_window=None must be a size"),
    ("gemma-2-2b", change(sliding_window=None), "sliding_window=None must be a size"),
    (
        PLAIN,
        change(rope_theta=1e4, rope_parameters={"rope_theta": 1e6}),
        "rope_theta=10000.0 and rope_parameters.rope_theta=1000000.0",
    ),
    (
        PLAIN,
        change(rope_scaling=LINEAR, rope_parameters={"rope_type": "default"}),
        "rope_scaling=.* and rope_parameters=.* must be equal",
    ),
    (
        PLAIN,
        change(rope_scaling=LINEAR | {"type": "llama3"}),
        "type='llama3' and rope_type='linear'",
    ),
    # Incomplete.
    (PLAIN, change(rope_scaling={"type": "linear"}), "has no field 'factor'"),
    (PLAIN, change(rope_scaling={"rope_type": "llama3"}), "has no field 'factor'"),
    (
        PLAIN,
        change(rope_scaling=LINEAR | {"rope_type": "llama3"}),
        "has no field 'low_freq_factor', which every rope_scaling of rope_type='lla",
    ),
    (PLAIN, change(rope_scaling=LINEAR | {"factor": "8"}), "factor='8' must be"),
    (
        LLAMA,
        change(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            }
        ),
        "high_freq_factor=1.0 must be above low_freq_factor=4.0",
    ),
]


@pytest.mark.parametrize(("name", "fields", "message"), DAMAGED, ids=str)
def test_a_config_that_is_damaged_or_contradicts_itself_says_where(
    name, fields, message
):
    with pytest.raises(DataError, match=message) as raised:
        read(name, **fields)
    assert str(raised.value).startswith("config.json")


@pytest.mark.parametrize("name", [QWEN2, "mistral-7b-v0.1", MOE, GEMMA3, "gpt2"])
def test_no_value_of_any_field_ends_in_a_traceback(name):
    values = ("x", [], {}, -1, 0, 1.5, True, "8", [1], {"a": 1}, None, 10**30)
    for field, value in itertools.product(fields_of(name), values):
        told = ""
        try:
            read(name, **{field: value})
        except (ConfigError, DataError) as error:
            told = str(error)
        assert not told or field in told or "does not divide" in told


def test_an_absent_field_and_one_that_is_null_differ():
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    absent = read("gemma-2-2b", without=caps)
    null = read("gemma-2-2b", **dict.fromkeys(caps))
    assert (absent.attention_softcap, absent.logit_softcap) == (50.0, 30.0)
    assert (null.attention_softcap, null.logit_softcap) == (0.0, 0.0)
    absent = read("mistral-7b-v0.1", without=("sliding_window",))
    null = read("mistral-7b-v0.1", sliding_window=None)
    assert {layer.window for layer in absent.layers} == {4096}
    assert {layer.window for layer in null.layers} == {0}


def test_the_window_of_qwen3_moe_is_of_every_layer_or_of_none():
    model = read(MOE, ("max_window_layers",), use_sliding_window=True)
    assert {layer.window for layer in model.layers} == {0}  # sliding_window is null
    model = read(
        MOE, ("max_window_layers",), use_sliding_window=True, sliding_window=128
    )
    assert {layer.window for layer in model.layers} == {128}
    fields = hf_config.write_config(model, "qwen3_moe")
    assert fields["use_sliding_window"] is True
    assert "layer_types" not in fields
    assert "max_window_layers" not in fields
    mixed = dataclasses.replace(
        model, pattern=(*model.pattern, LayerConfig(feed_forward="experts")), repeats=24
    )
    with pytest.raises(ConfigError, match="qwen3_moe: layer 1"):
        hf_config.write_config(mixed, "qwen3_moe")


def test_a_width_that_heads_do_not_divide_is_written_as_a_family_that_allows_it():
    """As transformers' LlamaConfig does not, whatever head_dim is."""
    model = ModelConfig(vocab_size=9, width=30, num_heads=4, num_kv_heads=2, head_dim=8)
    assert hf_config.write_config(model)["model_type"] == "mistral"
    with pytest.raises(ConfigError, match="llama: 4 heads do not divide 30"):
        hf_config.write_config(model, "llama")


SAME = {
    "a base said twice": (
        change(rope_theta=5e4, pattern=(LayerConfig(rope_theta=5e4),)),
        change(rope_theta=5e4),
    ),
    "a base said by the layers alone": (
        change(rope_theta=1.0, pattern=(LayerConfig(rope_theta=5e4),)),
        change(rope_theta=5e4),
    ),
    "numbers of no scaling": (
        change(rope_scaling=RopeScaling(factor=2.0, original_length=7)), {},
    ),
    "scaling by one": (change(rope_scaling=RopeScaling(kind="linear")), {}),
    "numbers that linear scaling has not": (
        change(rope_scaling=RopeScaling(kind="linear", factor=2.0, low_freq=3.0)),
        change(rope_scaling=RopeScaling(kind="linear", factor=2.0)),
    ),
    "scaling that no layer has": (
        change(
            rope_scaling=RopeScaling(kind="linear", factor=2.0),
            pattern=(LayerConfig(rope_theta=5e4),),
        ),
        change(rope_theta=5e4),
    ),
    "rotary settings of learned positions": (
        change(positions="learned", max_length=9, rope_scaling=RopeScaling(factor=2.0)),
        change(positions="learned", max_length=9, rope_theta=7.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_one_function_said_in_two_ways_is_the_same_model(what):
    one, other = (ModelConfig(**settings) for settings in SAME[what])
    assert same_model.differences(one, other) == []


def test_scaling_makes_a_base_of_a_layer_another():
    """A layer's own base is not scaled, the model's is."""
    scaling = RopeScaling(kind="linear", factor=2.0)
    plain, own = LayerConfig(), LayerConfig(rope_theta=10_000.0)
    one = ModelConfig(rope_scaling=scaling, pattern=(plain, plain))
    other = ModelConfig(rope_scaling=scaling, pattern=(plain, own))
    assert same_model.differences(one, other) != []


# Sizes that every file states: they are not invented where they are not there.
REQUIRED = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "n_embd", "n_layer", "n_head", "n_positions",
}  # fmt: skip
WINDOWED = change(use_sliding_window=True, sliding_window=24, layer_types=None)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_field_that_is_absent_is_what_the_class_of_transformers_has(family):
    """As written in full by the class, then each field left out, of the class's own
    defaults and, where it has windows, with their use switched on."""
    transformers = pytest.importorskip("transformers")
    kind = type(transformers.AutoConfig.for_model(family))
    for settings in ({}, WINDOWED if "qwen" in family else {}):
        full = json.loads(json.dumps(kind(**settings).to_dict() | settings))
        full["model_type"] = family
        compared = 0
        for field in sorted(full):
            less = {name: value for name, value in full.items() if name != field}
            if field in REQUIRED:
                with pytest.raises(DataError, match=f"has no field '{field}'"):
                    hf_config.read_config(less)
                continue
            if field == "model_type":
                continue
            theirs = kind(**less).to_dict() | {"model_type": family}
            theirs = json.loads(json.dumps(theirs))
            ours = hf_config.read_config(less)
            expected = hf_config.read_config(theirs)
            assert same_model.differences(ours, expected) == [], field
            compared += 1
        assert compared > 20
