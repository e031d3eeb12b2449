"""The shipped configs: their values, and the published sizes of their models."""

import json
import os
import pathlib
import re

import pytest

from jaxinfra import checks, options
from jaxinfra.config import Config

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden"
UPDATE = "JAXINFRA_UPDATE_GOLDEN"  # set to 1 to write the golden texts again
NAMES = [
    "digits_convnet", "fashion_convnet", "gpt2_124m", "llama3_405b", "llama3_70b",
    "llama3_8b", "mixtral_8x7b", "shakespeare_char", "smollm2_135m", "tiny", "tiny_moe",
]  # fmt: skip


def num_params(config: Config, *, vocab_size: int) -> int:
    """Parameters by the published architectures, written apart from our model."""
    m = config.model
    head = m.width // m.num_heads
    q, kv = m.num_heads * head, m.num_kv_heads * head
    attention = m.width * (q + 2 * kv) + q * m.width
    attention += (q + 2 * kv) * m.qkv_bias + m.width * m.out_bias
    matrices = 3 if m.activation == "swiglu" else 2
    ffn = matrices * m.width * m.ffn_width + (m.ffn_width + m.width) * m.mlp_bias
    if m.num_experts:
        ffn = ffn * m.num_experts + m.width * m.num_experts
    norm = m.width * (2 if m.norm == "layernorm" else 1)
    tables = vocab_size * (1 if m.tied else 2) + m.max_length
    return m.repeats * (attention + ffn + 2 * norm) + norm + tables * m.width


def test_the_shipped_configs_are_those_by_name():
    assert list(options.shipped_configs()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_value_changes_unseen(name):
    values = options.leaves(options.load_config(name))
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get(UPDATE):
        golden.write_text(text)
    assert golden.read_text() == text, f"if this is meant, run with {UPDATE}=1"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2_124m", 124_439_808),
        ("smollm2_135m", 134_515_008),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("llama3_405b", 405_853_388_800),
        ("mixtral_8x7b", 46_702_792_704),
    ],
)
def test_a_published_model_has_its_published_size(name, expected):
    config = options.load_config(name)
    assert num_params(config, vocab_size=config.model.vocab_size) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_named_like_its_file_and_breaks_no_rule(name):
    config = options.load_config(name)
    assert config.name == name
    checks.check(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_tells_data_cost_loss_and_the_mesh_that_is_set(name):
    source = (ROOT / "configs" / f"{name}.py").read_text()
    for word in ("Data: ", "Cost: ", "Expected: "):
        assert f"\n{word}" in source
    mesh = options.load_config(name).mesh
    stated = re.search(r"Mesh: fsdp (\d+) x tensor (\d+)", source)
    sizes = tuple(map(int, stated.groups())) if stated else (1, 1)
    assert sizes == (mesh.fsdp, mesh.tensor)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_the_same_by_path(name):
    path = ROOT / "configs" / f"{name}.py"
    assert options.load_config(str(path)) == options.load_config(name)
