"""Names of hardware."""

import pytest

from jaxinfra.config import ConfigError
from jaxinfra.plan import targets


def test_links_join_the_ends_of_whole_cubes_and_of_rows_of_16():
    assert targets.parse("v5p:4x4x8").wraps == (True, True, True)
    assert targets.parse("v5p:2x2x4").wraps == (False, False, False)
    assert targets.parse("v6e:8x16").wraps == (False, True, False)
    assert targets.parse("v5e:8x8").wraps == (False, False, False)


def test_a_name_gives_the_chips_and_their_number():
    target = targets.parse("v5p:2x2x4")
    assert (target.kind, target.shape, target.num_devices) == ("v5p", (2, 2, 4), 16)
    assert targets.parse("h100:2x8").num_devices == 16
    assert targets.parse("v6e:4x4").chip.platform == "tpu"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5q:2x2x2", "did you mean v5p"),
        ("v5p", "as in v5p:2x2x2"),
        ("v5p:2x2", "3 dims of chips"),
        ("v6e:4x0", "2 dims of chips"),
        ("h100:8", "nodes x GPUs a node, as in h100:1x8"),
        ("", "as in v5p:2x2x2"),
    ],
)
def test_a_wrong_name_is_told_with_a_right_one(name, words):
    with pytest.raises(ConfigError, match=words):
        targets.parse(name)


@pytest.mark.parametrize("kind", targets.CHIPS)
def test_the_figures_of_a_chip_are_of_its_kind(kind):
    chip = targets.CHIPS[kind]
    assert 1e10 < chip.hbm_bytes < 2e11
    assert 1e11 < chip.hbm_bytes_per_sec < 1e13
    assert 1e14 < chip.peak_flops < 1e16
    assert 1e10 < chip.link_bytes_per_sec < chip.hbm_bytes_per_sec
    assert 0 < chip.attention_share < 1
    assert (chip.clock_hz > 0) == (chip.platform == "tpu")
