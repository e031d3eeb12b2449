"""The table of what composes: every pair is refused, or is not, as it says."""

import dataclasses

import pytest

from jaxinfra import compositions, options
from jaxinfra.config import ConfigError

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
    "float16": ("tiny", {"precision": "float16"}),
    "quantized": ("tiny", {"precision": "fp8"}),
    "comm": ("tiny", {"mesh": {"fsdp": 2}, "comm": {"gather": "int8"}}),
    "reduce": ("tiny", {"mesh": {"fsdp": 2}, "comm": {"reduce": "int8"}}),
    "once": (
        "tiny",
        {
            "mesh": {"data": 2},
            "train": {"microbatches": 2},
            "parallel": {"reduce_once": "true"},
        },
    ),
    "adapters": ("tiny", {"lora": {"rank": 4}}),
    "freeze": ("tiny", {"train": {"freeze": "ffn"}}),
    "aware": ("tiny", {"train": {"quantize_aware": "int4"}}),
    "own task": ("tiny", {"task": "own"}),
}


def config_with(*features):
    """One config that asks for all of them."""
    name = next((ASKS[f][0] for f in features if ASKS[f][0] != "tiny"), "tiny")
    config = options.load_config(name)
    for feature in features:
        for part, value in ASKS[feature][1].items():
            if isinstance(value, dict):
                value = dataclasses.replace(getattr(config, part), **value)
            config = dataclasses.replace(config, **{part: value})
    return config


def sizes_of(config):
    return {k: n for k, n in dataclasses.asdict(config.mesh).items() if n > 0}


def test_every_feature_can_be_asked_for():
    assert ASKS.keys() == compositions.FEATURES.keys()
    for name, feature in compositions.FEATURES.items():
        config = config_with(name)
        assert feature.is_used(config, sizes_of(config)), name


@pytest.mark.parametrize("pair", compositions.APART, ids=lambda p: f"{p.one} {p.other}")
def test_what_does_not_compose_is_refused_with_reason_and_fix(pair):
    features = (pair.one, pair.other)
    if "own task" not in features and "quantized" in features:
        features = features[::-1]
    config = config_with(*features)
    sizes = sizes_of(config)
    assert all(compositions.FEATURES[f].is_used(config, sizes) for f in features)
    with pytest.raises(ConfigError) as error:
        compositions.check_compositions(config, sizes)
    for part in (pair.why, pair.fix):
        assert part in str(error.value)


def test_all_other_pairs_are_let_through():
    apart = {frozenset((pair.one, pair.other)) for pair in compositions.APART}
    for one in ASKS:
        for other in ASKS:
            is_apart = frozenset((one, other)) in apart
            if one != other and not is_apart and "quantized" not in (one, other):
                config = config_with(one, other)
                compositions.check_compositions(config, sizes_of(config))


def test_the_table_names_every_feature_and_every_reason():
    text = compositions.table()
    assert all(name in text for name in compositions.FEATURES)
    assert all(pair.why in text and pair.fix in text for pair in compositions.APART)
