"""The parameter table of every shipped config: a changed shape, axis or kind shows."""

import dataclasses
import os
import pathlib

import pytest

from jaxinfra import dry_run, options, params
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.models import transformer

GOLDEN = pathlib.Path(__file__).parent / "golden"
UPDATE = "JAXINFRA_UPDATE_GOLDEN"  # set to 1 to write the golden texts again
NAMES = [
    name
    for name in options.shipped_configs()
    if options.load_config(name).task == "text"
]


def model_of(name):
    """The model of a config; 257 ids, a byte tokenizer's, where it states none."""
    model = options.load_config(name).model
    vocab_size = model.vocab_size or ByteTokenizer().vocab_size
    return dataclasses.replace(model, vocab_size=vocab_size)


@pytest.mark.parametrize("name", NAMES)
def test_no_parameter_changes_unseen(name):
    text = dry_run.table(transformer.param_specs(model_of(name))) + "\n"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get(UPDATE):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert golden.read_text() == text, f"if this is meant, run with {UPDATE}=1"


def test_every_golden_table_has_its_config():
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == sorted(NAMES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2_124m", 124_439_808),
        ("smollm2_135m", 134_515_008),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("llama3_405b", 405_853_388_800),
    ],
)
def test_a_published_model_has_its_published_number_of_parameters(name, expected):
    assert params.count(transformer.param_specs(model_of(name))) == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_spec_is_whole(name):
    """One axis name a dim, contracted dims within the shape, matrices contract."""
    for path, spec in params.named(transformer.param_specs(model_of(name))):
        assert len(spec.axes) == len(spec.shape), path
        assert all(0 <= dim < len(spec.shape) for dim in spec.contract), path
        assert bool(spec.contract) == (spec.kind in ("matrix", "head")), path
