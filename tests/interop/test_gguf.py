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


def write(path, *, architecture="llama", quantized=(), tokens=None):
    fields = json.loads((GOLDEN / "llama" / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_embedding_length(fields["hidden_size"])
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
