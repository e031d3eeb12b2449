"""Rules between settings; the messages stand in wrong_command_lines."""

import typing

import pytest

from jaxinfra import checks, options
from jaxinfra.config import AXES, Config, ConfigError

CONFIG = Config(name="test")


def config(*argv: str) -> Config:
    return options.parse(list(argv), CONFIG)


def test_the_defaults_break_no_rule():
    checks.check(CONFIG)


def test_every_number_is_in_one_range():
    numbers = [
        key for key, kind in options.every_option(Config) if kind in (int, float)
    ]
    ranged = [key for _, keys in checks.RANGES.values() for key in keys]
    assert sorted(ranged) == sorted(numbers)


@pytest.mark.parametrize(
    "argv",
    [
        ["--train.steps=0", "--optimizer.warmup_steps=20"],
        ["--model.head_dim=10", "--model.num_heads=3", "--model.num_kv_heads=1"],
        ["--model.positions=learned", "--model.max_length=256"],
        ["--model.positions=learned", "--model.max_length=300", "--model.head_dim=7"],
        ["--model.repeats=0", "--model.prefix=[{}]"],
        ["--optimizer.schedule=wsd", "--optimizer.decay_fraction=1"],
        ["--train.remat=save:query+ffn_in"],
        ["--train.remat=save:query,offload:layer_input+ffn_in"],
        ["--mesh.fsdp=3", "--zero=0", "--train.batch_size=12"],
        ["--mesh.data=1", "--mesh.fsdp=8", "--runtime.cpu_devices=8"],
        ["--runtime.num_processes=2", "--runtime.coordinator=[::1]:80"],
        ["--mesh.pipeline=3", "--train.microbatches=2", "--zero=3"],
        [
            "--mesh.pipeline=2",
            "--parallel.schedule=interleaved",
            "--parallel.virtual_stages=2",
        ],
        ["--run.seed=4294967295"],
        ["--run.dir=/no/such/folder/yet"],
        ["--data.path=."],
    ],
)
def test_what_is_unusual_and_right_is_allowed(argv):
    checks.check(config(*argv))


@pytest.mark.parametrize(
    ("argv", "devices", "expected"),
    [
        ([], 1, {}),
        ([], 8, {"data": 8}),
        (["--mesh.fsdp=2", "--mesh.tensor=4"], 16, {"data": 2, "fsdp": 2, "tensor": 4}),
        (["--mesh.data=2", "--mesh.fsdp=-1"], 8, {"data": 2, "fsdp": 4}),
        (["--mesh.data=2"], 2, {"data": 2}),
    ],
)
def test_the_rest_of_the_devices_go_to_the_axis_of_size_minus_1(
    argv, devices, expected
):
    sizes = checks.resolve_mesh(config(*argv), devices)
    assert tuple(sizes) == AXES
    assert {axis: n for axis, n in sizes.items() if n > 1} == expected


@pytest.mark.parametrize(
    ("argv", "devices", "message"),
    [
        (["--mesh.fsdp=3"], 8, "mesh.fsdp=3 takes 3 devices of 8"),
        (["--mesh.data=1"], 8, "the mesh takes 1 devices of 8; set mesh.data"),
        (["--mesh.data=2", "--mesh.fsdp=8"], 8, "takes 16 devices of 8"),
        ([], 32, "do not divide over the 32 parts of mesh axes data=32"),
        (["--train.microbatches=4"], 8, "gives 4 rows"),
        (["--mesh.data=1", "--mesh.tensor=-1"], 8, "model.num_heads=4 does not divide"),
        (["--mesh.slices=3"], 8, "mesh.slices=3 divides neither"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(argv, devices, message):
    with pytest.raises(ConfigError) as error:
        checks.resolve_mesh(config(*argv), devices)
    assert message in str(error.value)


def test_devices_of_all_processes_count():
    argv = ["--runtime.cpu_devices=4", "--runtime.num_processes=2"]
    assert checks.known_device_count(config(*argv)) == 8
    assert checks.known_device_count(config("--runtime.devices=6")) == 6
    assert checks.known_device_count(CONFIG) == 0


def test_zero_is_3_without_a_pipeline_and_1_with_one():
    assert checks.resolve_zero(CONFIG) == 3
    assert checks.resolve_zero(config("--mesh.pipeline=2")) == 1
    assert checks.resolve_zero(config("--zero=2", "--mesh.pipeline=2")) == 2


def test_a_vocabulary_must_hold_the_tokenizers_ids():
    checks.check(config("--model.vocab_size=300"), vocab_size=256)
    checks.check(CONFIG, vocab_size=256)
    with pytest.raises(ConfigError, match="vocab_size=255 is below"):
        checks.check(config("--model.vocab_size=255"), vocab_size=256)


def test_huge_repeats_are_not_unrolled():
    checks.check(config(f"--model.repeats={checks.MAX_INT}"))


def test_every_precision_is_there():
    for precision in typing.get_args(typing.get_type_hints(Config)["precision"]):
        checks.check(config("--precision", precision))
