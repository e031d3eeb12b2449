"""Which words of a command line are keys, and which keys matter."""

import pytest

from jaxinfra.config import Config, ConfigError, ModelConfig
from jaxinfra.generate import settings

DEFAULT = Config(name="evaluate")


def test_keys_and_own_options_are_told_apart_wherever_they_stand():
    line = "--mesh.fsdp 2 runs/a --text x y --zero=3 z --precision bfloat16 --out o"
    own, words = settings.split(line.split())
    assert own == ["runs/a", "--text", "x", "y", "z", "--out", "o"]
    assert words == ["--mesh.fsdp", "2", "--zero=3", "--precision", "bfloat16"]
    config = settings.read(words, DEFAULT)
    assert (config.mesh.fsdp, config.zero, config.precision) == (2, 3, "bfloat16")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--mesh.fdsp 2", "did you mean --mesh.fsdp"),
        ("--train.steps 3", "--train.steps changes nothing here"),
        ("--runtime.num_processes 2", "changes nothing here"),
        ("--mesh.fsdp 0", "mesh.fsdp=0 must be at least 1"),
        ("--runtime.cpu_devices 4 --mesh.tensor 3", "takes 3 devices of 4"),
        ("--precision half", "must be one of"),
    ],
)
def test_wrong_keys_are_refused(line, message):
    with pytest.raises(ConfigError, match=message):
        settings.read(line.split(), DEFAULT)


def test_a_batch_divides_on_any_number_of_devices():
    words = ["--runtime.cpu_devices", "3", "--mesh.fsdp", "3"]
    config = settings.read(words, DEFAULT)
    config = settings.for_model(config, ModelConfig(vocab_size=9), num_devices=3)
    assert config.train.batch_size == 3


def test_a_source_must_be_there(tmp_path):
    settings.check_source("--from", str(tmp_path))
    settings.check_source("--from", f"{tmp_path}@20")
    for path in (tmp_path / "none", f"{tmp_path / 'none'}@20", f"{tmp_path}@x"):
        with pytest.raises(ConfigError, match=r"--from .* is not there"):
            settings.check_source("--from", str(path))
