"""Published folders that are damaged or of another model: one clear error each."""

import json
import shutil
import struct

import jax
import numpy as np
import pytest
from golden_checkpoints import GOLDEN, layout_of, read

from jaxinfra.config import ConfigError, DataError
from jaxinfra.interop import hf, pretrained, tensorfile


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, change):
    """The tensors again, after `change` of the dict name -> array."""
    arrays = {k: v.read() for k, v in tensorfile.open_folder(folder).items()}
    change(arrays)
    tensors = [
        tensorfile.Writing(name, array.dtype, array.shape, lambda array=array: array)
        for name, array in arrays.items()
    ]
    tensorfile.write_folder(folder, tensors)


def load(folder):
    published, layout = hf.open_folder(folder), layout_of()
    with jax.set_mesh(layout.mesh):
        return read(published, layout)


def cut(folder):
    path = folder / tensorfile.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder):
    path = folder / tensorfile.WEIGHTS
    path.write_bytes(path.read_bytes()[:50])


def no_json(folder):
    path = folder / tensorfile.WEIGHTS
    path.write_bytes(struct.pack("<Q", 8) + b"not json")


def header_of(folder, change):
    path = folder / tensorfile.WEIGHTS
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlap(folder):
    def change(header):
        header[NORM]["data_offsets"] = [0, 32 * 4]

    header_of(folder, change)


def index_of(folder, places):
    (folder / tensorfile.INDEX).write_text(json.dumps({"weight_map": places}))


NORM = "model.norm.weight"
DAMAGE = {
    "cut off": (cut, "cut off"),
    "cut in its header": (cut_header, "cut off"),
    "no JSON": (no_json, "no readable header"),
    "overlap": (overlap, "overlapping"),
    "a missing tensor": (
        lambda f: rewrite(f, lambda a: a.pop(NORM)),
        "lacks tensors 'model.norm.weight'",
    ),
    "an unknown tensor": (
        lambda f: rewrite(f, lambda a: a.update(extra=a[NORM])),
        "has unknown tensors 'extra'",
    ),
    "a wrong shape": (
        lambda f: rewrite(f, lambda a: a.update({NORM: a[NORM][:-1]})),
        "has shape .31. and config.json says .32.",
    ),
    "a tied head that is another": (
        lambda f: change_config(f, tie_word_embeddings=True),
        "unknown tensors 'lm_head.weight'",
    ),
    "a path out of the folder": (
        lambda f: index_of(f, {NORM: "../model/model.safetensors"}),
        "a file must be one beside the index",
    ),
    "an absolute path": (
        lambda f: index_of(f, {NORM: "/etc/passwd"}), "must be one beside the index",
    ),
    "an index of a file that is not there": (
        lambda f: index_of(f, {NORM: "model-00001-of-00002.safetensors"}),
        "cannot be read",
    ),
    "an index that lies": (
        lambda f: index_of(f, {"model.x": "model.safetensors"}), "does not place there",
    ),
    "an index that is no JSON": (
        lambda f: (f / tensorfile.INDEX).write_text("{"), "is no index",
    ),
    "no weights": (
        lambda f: (f / tensorfile.WEIGHTS).unlink(), "neither model.safetensors nor",
    ),
    "a config without heads": (
        lambda f: change_config(f, num_attention_heads=None),
        "config.json has no field 'num_attention_heads'",
    ),
    "a config whose heads do not divide": (
        lambda f: change_config(f, num_attention_heads=5),
        "num_key_value_heads=2 does not divide num_attention_heads=5",
    ),
    "a config with a number as text": (
        lambda f: change_config(f, hidden_size="32"), "hidden_size='32' must be",
    ),
    "a pickle": (
        lambda f: (f / tensorfile.WEIGHTS).rename(f / "pytorch_model.bin"),
        "which is a pickle and is not opened",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_weights_are_refused_by_name(what, folder):
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(DataError, match=message) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


CONFIGS = {
    "an unknown family": ({"model_type": "lama"}, "did you mean llama"),
    "an unknown field": ({"sparsity": 0.5}, "field 'sparsity' of a llama is not known"),
    "an unknown activation": ({"hidden_act": "mish"}, "hidden_act='mish'"),
    "an unknown rotary": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'",
    ),
    "an unknown rotary field": (
        {"rope_parameters": {"rope_type": "default", "mscale": 2.0}}, "mscale",
    ),
    "quantized": ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_is_not_understood_is_refused_by_field(what, folder):
    fields, message = CONFIGS[what]
    change_config(folder, **fields)
    with pytest.raises(ConfigError, match=message):
        hf.open_folder(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_json_object_is_refused(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json"):
        pretrained.open_source(str(folder))


def test_a_path_that_is_no_source_says_what_one_is(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        pretrained.open_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="neither a run folder"):
        pretrained.open_source(str(tmp_path))


def test_buffers_and_missing_prefixes_of_old_gpt2_are_known(tmp_path):
    shutil.copytree(GOLDEN / "gpt2", tmp_path / "old")

    def older(arrays):
        for name in list(arrays):
            arrays[name.removeprefix("transformer.")] = arrays.pop(name)
        arrays["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)

    rewrite(tmp_path / "old", older)
    with jax.set_mesh(layout_of().mesh):
        old, new = load(tmp_path / "old"), load(GOLDEN / "gpt2")
        assert jax.tree.all(jax.tree.map(np.array_equal, old, new))
