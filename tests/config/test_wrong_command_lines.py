"""Every wrong command line is refused, in words that say what to change."""

import pathlib

import pytest
from wrong_command_lines import WRONG

from jaxinfra import options
from jaxinfra.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]  # where paths in the table begin


@pytest.mark.parametrize(("argv", "parts"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_a_wrong_command_line_is_refused_with_a_hint(argv, parts, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        options.read_command(argv)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
