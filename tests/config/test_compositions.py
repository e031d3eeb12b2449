"""The table of what composes: every pair is refused, or is not, as it says."""

import dataclasses
import functools
import itertools
import math

import pytest

from jaxinfra import checks, compositions, options
from jaxinfra.config import AXES, ConfigError

# A config that asks for each feature and little else.
ASKS = {
    "data": ("tiny", {"mesh": {"data": 2}}),
    "fsdp": ("tiny", {"mesh": {"fsdp": 2}}),
    "expert": ("tiny", {"mesh": {"expert": 2}}),
    "ring": ("tiny", {"mesh": {"context": 2}}),
    "ulysses": ("tiny", {"mesh": {"context": 2}, "parallel": {"context": "ulysses"}}),
    "all_gather": (
        "tiny",
        {"mesh": {"context": 2}, "parallel": {"context": "all_gather"}},
    ),
    "tensor": ("tiny", {"mesh": {"tensor": 2}}),
    "pipeline": ("tiny", {"mesh": {"pipeline": 2}}),
    "slices": ("tiny", {"mesh": {"slices": 2, "data": 2}}),
    "dropless": ("tiny_moe", {"model": {"capacity_factor": 0.0}}),
    "bounded": ("tiny_moe", {"model": {"capacity_factor": 1.25}}),
    "dense experts": ("tiny_moe", {"parallel": {"experts": "dense"}}),
    "microbatches": ("tiny", {"train": {"microbatches": 2}}),
    "remat": ("tiny", {"train": {"remat": "full"}}),
    "offload": ("tiny", {"train": {"remat": "offload:layer_input"}}),
    "dropout": ("tiny", {"model": {"dropout": 0.1}}),
    "muon": ("tiny", {"optimizer": {"name": "muon"}}),
    "8-bit moments": ("tiny", {"optimizer": {"name": "adamw", "moments": "8bit"}}),
    "state on host": ("tiny", {"optimizer": {"offload": True}}),
    "zero 0 or 1": ("tiny", {"zero": 1}),
    "float16": ("tiny", {"precision": "float16"}),
    "quantized": ("tiny", {"precision": "fp8"}),
    "comm": ("tiny", {"mesh": {"fsdp": 2}, "zero": 3, "comm": {"gather": "int8"}}),
    "reduce": ("tiny", {"mesh": {"fsdp": 2}, "zero": 3, "comm": {"reduce": "int8"}}),
    "once": (
        "tiny",
        {
            "mesh": {"data": 2},
            "train": {"microbatches": 2},
            "parallel": {"reduce_once": "true"},
        },
    ),
    "adapters": ("tiny", {"lora": {"rank": 4}, "init": {"from_": "run"}}),
    "freeze": ("tiny", {"train": {"freeze": "ffn"}, "init": {"from_": "run"}}),
    "aware": ("tiny", {"train": {"quantize_aware": "int4"}}),
    "own task": ("tiny", {"task": "own"}),
}


load = functools.cache(options.load_config)


def config_with(*features):
    """One config that asks for all of them."""
    name = next((ASKS[f][0] for f in features if ASKS[f][0] != "tiny"), "tiny")
    config = load(name)
    for feature in features:
        for part, value in ASKS[feature][1].items():
            if isinstance(value, dict):
                value = dataclasses.replace(getattr(config, part), **value)
            config = dataclasses.replace(config, **{part: value})
    return config


def sizes_of(config):
    return {k: n for k, n in dataclasses.asdict(config.mesh).items() if n > 0}


def is_asked_for(config, *features):
    sizes = sizes_of(config)
    return all(compositions.FEATURES[f].is_used(config, sizes) for f in features)


def test_every_feature_can_be_asked_for():
    assert ASKS.keys() == compositions.FEATURES.keys()
    for name, feature in compositions.FEATURES.items():
        config = config_with(name)
        assert feature.is_used(config, sizes_of(config)), name


@pytest.mark.parametrize("pair", compositions.APART, ids=lambda p: f"{p.one} {p.other}")
def test_what_does_not_compose_is_refused_with_reason_and_fix(pair):
    features = (pair.one, pair.other)
    config = config_with(*features)
    if not is_asked_for(config, *features):
        config = config_with(*features[::-1])
    assert is_asked_for(config, *features)
    with pytest.raises(ConfigError) as error:
        compositions.check_compositions(config, sizes_of(config))
    for part in (pair.why, pair.fix):
        assert part in str(error.value)


APART = {frozenset((pair.one, pair.other)) for pair in compositions.APART}
APART |= {
    frozenset(pair)
    for names in compositions.ALTERNATIVES
    for pair in itertools.combinations(names, 2)
}
APART |= {frozenset((name, "own task")) for name in compositions.of_the_task()}


@pytest.mark.parametrize("one", ASKS)
def test_all_other_pairs_pass_every_check_of_the_devices_that_they_need(one):
    for other in ASKS:
        if one == other or frozenset((one, other)) in APART:
            continue
        config = config_with(one, other)
        if not is_asked_for(config, one, other):  # the later has set the same key
            config = config_with(other, one)
        assert is_asked_for(config, one, other), other
        sizes = sizes_of(config)
        checks.resolve_mesh(config, math.prod(sizes.get(axis, 1) for axis in AXES))


@pytest.mark.parametrize("name", compositions.of_the_task())
def test_what_a_task_of_its_own_does_not_read_is_refused_where_it_is_asked(name):
    key = compositions.FEATURES[name].key
    # The first is of no use without experts; the second it reads.
    if not key.startswith("parallel.") and key != "model.dropout":
        part, setting = key.split(".")
        value = ASKS[name][1][part][setting]
        with pytest.raises(ConfigError, match=f"{key}.*TASK_KEYS"):
            options.read_command(["--config", "digits_convnet", f"--{key}", str(value)])


def test_the_table_names_every_feature_and_every_reason():
    text = compositions.table()
    assert all(name in text for name in compositions.FEATURES)
    assert all(pair.why in text and pair.fix in text for pair in compositions.APART)
