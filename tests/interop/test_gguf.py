"""GGUF files against the published folder that they were made from."""

import json

import gguf
import jax
import numpy as np
import pytest
from golden_checkpoints import GOLDEN, layout_of, read

from jaxinfra.config import ConfigError, DataError
from jaxinfra.interop import gguf_file, hf, pretrained, same_model, tensorfile

Q8_ROUNDING = 1 / 127  # of a block's largest value, half of it either way


def neighbours(array, heads):
    """Rotary halves as llama.cpp stores them: pairs beside each other."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write(path, *, architecture="llama", quantized=(), tokens=None, more=None):
    """The golden llama; `more(writer)` adds to it."""
    fields = json.loads((GOLDEN / "llama" / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_context_length(64)
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    tokens = tokens or ["t0t1", *(f"t{i}" for i in range(fields["vocab_size"] - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["a b"] if "ab" in tokens else ["t0 t1"])
    writer.add_eos_token_id(len(tokens) - 1)
    if more:
        more(writer)
    names = {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"}
    names |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    names |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "model.layers": "blk"}
    names |= {"model.embed_tokens": "token_embd", "lm_head": "output"}
    names |= {"model.norm": "output_norm"}
    heads = {"attn_q": 4, "attn_k": 2}
    for published, stored in tensorfile.open_folder(GOLDEN / "llama").items():
        name, array = published, stored.read()
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        part = name.split(".")[-2]
        array = neighbours(array, heads[part]) if part in heads else array
        kind = None
        if part in quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_holds_the_model_it_was_made_from(tmp_path):
    source = pretrained.open_source(str(write(tmp_path / "m.gguf")))
    published, layout = hf.open_folder(GOLDEN / "llama"), layout_of(fsdp=2, tensor=2)
    assert same_model.differences(source.model, published.model) == []
    with jax.set_mesh(layout.mesh):
        ours = source.load(layout=layout, dtype=np.float32)
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, read(published, layout)))


def test_quantized_tensors_are_read_as_what_they_stand_for(tmp_path):
    source = pretrained.open_source(
        str(write(tmp_path / "m.gguf", quantized=("ffn_up", "attn_q")))
    )
    published, layout = hf.open_folder(GOLDEN / "llama"), layout_of()
    with jax.set_mesh(layout.mesh):
        ours = source.load(layout=layout, dtype=np.float32)["pattern"][0]
        theirs = read(published, layout)["pattern"][0]
    for part, name in (("ffn", "up"), ("attention", "query")):
        got, expected = np.array(ours[part][name]), np.array(theirs[part][name])
        assert not np.array_equal(got, expected)
        np.testing.assert_allclose(
            got, expected, atol=0.51 * Q8_ROUNDING * np.abs(expected).max()
        )


SETTINGS = {
    "attention.sliding_window": 3, "rope.dimension_count": 4, "expert_count": 8,
    "rope.scale_linear": 4, "vocab_size": 88, "attention.clamp_kqv": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_would_change_the_model_is_refused_by_name(tmp_path, name):
    more = lambda writer: writer.add_uint32(f"llama.{name}", SETTINGS[name])
    path = write(tmp_path / "m.gguf", more=more)
    with pytest.raises(ConfigError, match=f"llama.{name}={SETTINGS[name]}"):
        pretrained.open_source(str(path))


def test_settings_that_change_nothing_are_read(tmp_path):
    def more(writer):
        writer.add_rope_dimension_count(8)
        writer.add_vocab_size(89)
        writer.add_expert_count(0)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)

    model = pretrained.open_source(str(write(tmp_path / "m.gguf", more=more))).model
    assert model.max_length == 64


def test_llama_3_has_its_scaled_rotary_as_divisors(tmp_path):
    """The factors that llama.cpp's conversion writes, by its own formula."""
    factors = []
    for i in range(4):
        length = 2 * np.pi * 10_000.0 ** (i / 4)
        smooth = np.clip((8192 / length - 1) / (4 - 1), 0, 1)
        factors.append(1 / ((1 - smooth) / 32 + smooth))
    more = lambda writer: writer.add_tensor(
        "rope_freqs.weight", np.array(factors, np.float32)
    )
    path = write(tmp_path / "m.gguf", more=more)
    found = pretrained.open_source(str(path)).model.rope_scaling
    assert (found.kind, found.factor, found.original_length) == ("llama3", 32.0, 8192)
    factors[3] *= 1.01
    path.unlink()
    write(path, more=more)
    with pytest.raises(ConfigError, match="is not the scaling of Llama 3"):
        pretrained.open_source(str(path))


def test_a_tokenizer_of_damaged_ids_is_refused(tmp_path):
    more = lambda writer: writer.add_bos_token_id(9999)
    path = write(tmp_path / "m.gguf", more=more)
    with pytest.raises(DataError, match="bos_token_id=9999 is none of its 89 tokens"):
        gguf_file.tokenizer_files(path)


def test_an_unknown_architecture_is_named(tmp_path):
    path = write(tmp_path / "m.gguf", architecture="mamba")
    with pytest.raises(ConfigError, match="architecture 'mamba' is not one of llama"):
        pretrained.open_source(str(path))


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        pretrained.open_source(str(path))
    path.write_bytes(b"GGUF")
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        pretrained.open_source(str(path))


def test_its_tokenizer_becomes_files_that_the_library_reads(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    signs = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["Ġ", "ab", "<end>"]
    path = write(tmp_path / "m.gguf", tokens=signs + [f"x{i}" for i in range(60)])
    files = gguf_file.tokenizer_files(path)
    made = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    assert made.encode("ba ab").ids == [1, 0, 26, 27]
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "x59"
