"""Config <-> command line <-> JSON."""

import contextlib
import dataclasses
import json
import pathlib
import string
import subprocess
import sys
import typing

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxinfra import options, resuming
from jaxinfra.config import Config, ConfigError, EvalConfig, LayerConfig

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = Config(name="test")

names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner),
    max_leaves=5,
)


def values(kind) -> st.SearchStrategy:
    """Any value of an annotated type, as the config's rules of type allow it."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {f.name: values(hints[f.name]) for f in dataclasses.fields(kind)}
        return st.builds(kind, **fields)
    args = typing.get_args(kind)
    match typing.get_origin(kind) or kind:
        case typing.Literal:
            return st.sampled_from(args)
        case origin if origin is tuple:
            return st.lists(values(args[0]), max_size=2).map(tuple)
        case origin if origin is dict:
            return st.dictionaries(names, values(args[1]), max_size=2)
        case origin if origin is float:
            return st.floats(allow_nan=False, allow_infinity=False)
        case origin if origin is str:
            return st.text(max_size=5)
        case origin if origin is bool:
            return st.booleans()
        case _:
            return st.integers()


def spelled(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_no_option_leaves_the_default():
    assert options.parse([], CONFIG) == CONFIG


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--train.steps", "10_000"], "train.steps", 10_000),
        (["--mesh.fsdp", "-1"], "mesh.fsdp", -1),
        (["--mesh.fsdp=-1"], "mesh.fsdp", -1),
        (["--train.max_secs", "3"], "train.max_secs", 3.0),
        (["--optimizer.eps", "1e-6"], "optimizer.eps", 1e-6),
        (["--run.accept_changes", "true"], "run.accept_changes", True),
        (["--sample.prompt", "a = b"], "sample.prompt", "a = b"),
        (["--sample.prompt=--a=b"], "sample.prompt", "--a=b"),
        (["--sample.prompt="], "sample.prompt", ""),
        (["--init.from", "runs/a@5"], "init.from", "runs/a@5"),
        (["--zero", "1"], "zero", 1),
        (["--eval.sets.bible", "b.txt"], "eval.sets.bible", "b.txt"),
    ],
)
def test_an_option_sets_its_key_and_no_other(argv, key, value):
    config = options.parse(argv, CONFIG)
    assert [(k, new) for k, _, new in resuming.diff(CONFIG, config)] == [(key, value)]
    assert type(options.leaves(config)[key]) is type(value)


def test_layers_are_a_json_list_in_which_left_out_fields_have_defaults():
    argv = ["--model.pattern", '[{"window": 128}, {"rope_theta": 5}, {}]']
    assert options.parse(argv, CONFIG).model.pattern == (
        LayerConfig(window=128),
        LayerConfig(rope_theta=5.0),
        LayerConfig(),
    )


def test_options_add_to_the_sets_of_the_config():
    default = dataclasses.replace(CONFIG, eval=EvalConfig(sets={"a": "x"}))
    config = options.parse(["--eval.sets.b", "y"], default)
    assert config.eval.sets == {"a": "x", "b": "y"}
    assert default.eval.sets == {"a": "x"}


@hypothesis.given(values(Config))
@hypothesis.settings(max_examples=50, deadline=None)
def test_json_gives_back_every_config(config):
    text = json.dumps(options.to_json(config))
    assert options.from_json(json.loads(text)) == config


@hypothesis.given(values(Config), values(Config))
@hypothesis.settings(max_examples=30, deadline=None)
def test_every_difference_can_be_given_on_the_command_line(old, new):
    new = dataclasses.replace(
        new,
        eval=dataclasses.replace(new.eval, sets=old.eval.sets | new.eval.sets),
        data=dataclasses.replace(
            new.data,
            sets=old.data.sets | new.data.sets,
            weights=old.data.weights | new.data.weights,
        ),
    )
    argv = [f"--{key}={spelled(value)}" for key, _, value in resuming.diff(old, new)]
    assert options.parse(argv, old) == new


@hypothesis.given(st.data(), json_values)
@hypothesis.settings(max_examples=300, deadline=None)
def test_damaged_json_is_a_config_error_or_a_config(data, value):
    tree = node = options.to_json(CONFIG)
    path = data.draw(st.sampled_from(list(options.leaves(CONFIG)))).split(".")
    for name in path[: data.draw(st.integers(0, len(path) - 1))]:
        node = node[name]
    node[data.draw(st.sampled_from(list(node)) | names)] = value
    with contextlib.suppress(ConfigError):
        assert isinstance(options.from_json(tree), Config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.stepz", 5, "unknown key train.stepz; did you mean steps?"),
        ("train.steps", True, "train.steps=True must be an integer"),
        ("train.steps", 5.0, "train.steps=5.0 must be an integer"),
        ("train.max_secs", "5", "train.max_secs='5' must be a finite number"),
        ("train.max_secs", 10**400, "must be a finite number"),
        ("train.max_secs", float("inf"), "must be a finite number"),
        ("model.tied", 1, "model.tied=1 must be true or false"),
        ("model.norm", ["rmsnorm"], "must be one of rmsnorm, layernorm"),
        ("model.pattern", {}, "model.pattern={} must be a JSON list"),
        ("eval.sets", [], "eval.sets=[] must be an object"),
        ("eval.sets", {"a": 1}, "eval.sets.a=1 must be text"),
    ],
)
def test_json_of_the_wrong_shape_is_refused_by_key(key, value, message):
    tree = options.to_json(CONFIG)
    section, name = key.split(".")
    tree[section][name] = value
    with pytest.raises(ConfigError) as error:
        options.from_json(tree)
    assert message in str(error.value)


def test_json_without_a_key_is_refused():
    tree = options.to_json(CONFIG)
    del tree["train"]["steps"]
    with pytest.raises(ConfigError, match=r"missing key train\.steps"):
        options.from_json(tree)


@pytest.mark.parametrize("tree", [None, [], 3, "x", {}])
def test_json_that_is_no_config_is_refused(tree):
    with pytest.raises(ConfigError):
        options.from_json(tree)


def test_json_nested_too_deep_is_refused():
    with pytest.raises(ConfigError, match="JSON list"):
        options.parse(["--model.pattern", "[" * 100_000], CONFIG)


def test_the_diff_tells_what_a_resumed_run_may_not_change():
    argv = ["--mesh.fsdp=8", "--zero=1", "--train.steps=9", "--train.length=9"]
    argv += ["--eval.sets.a=b", "--run.dir=x", "--run.seed=3", "--init.from=y"]
    changes = resuming.diff(CONFIG, options.parse(argv, CONFIG))
    assert len(changes) == 8
    assert resuming.not_resumable(changes) == [
        ("run.seed", 0, 3),
        ("train.length", 256, 9),
        ("init.from", "", "y"),
    ]


def test_every_key_that_may_change_on_resume_exists():
    keys = [f"{key}." for key, _ in options.every_option(Config)]
    for prefix in resuming.RESUMABLE:
        assert any(key.startswith(f"{prefix}.") for key in keys), prefix


NAMED = ("eval.sets.", "data.sets.", "data.weights.")


@pytest.mark.slow
def test_five_typos_of_every_option_are_refused_with_a_hint():
    for key, _ in options.every_option(Config):
        section, dot, name = key.rpartition(".")
        typos = [
            f"{section}{dot}{name[:-2]}{name[-1]}",  # a letter left out
            f"{section}{dot}{name}{name[-1]}",  # doubled
            f"{section}{dot}{name[1::-1]}{name[2:]}",  # swapped
            f"x{section}{dot}{name}",
            key.replace(".", "-").replace("_", "-") + "-",
        ]
        for typo in typos:
            if typo == key or typo.startswith(NAMED):
                continue  # ffn with its letters swapped; any name of a set
            with pytest.raises(ConfigError) as error:
                options.parse([f"--{typo}", "1"], CONFIG)
            assert "did you mean --" in str(error.value)


def test_help_names_every_option_and_exits_0(capsys):
    with pytest.raises(SystemExit) as stop:
        options.read_command(["--config", "tiny", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key, _ in options.every_option(Config):
        assert f"--{key} " in text
    assert "--train.steps int" in text


def write(folder: pathlib.Path, source: str) -> str:
    path = folder / "mine.py"
    path.write_text(source)
    return str(path)


def test_a_config_file_may_start_from_a_shipped_one(tmp_path):
    source = """
import dataclasses
from jaxinfra import options

def get_config():
    return dataclasses.replace(options.load_config("tiny"), name="mine")
"""
    assert options.load_config(write(tmp_path, source)).name == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]  # no cache


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("x = 1", ["mine.py gives no config", "define get_config()"]),
        ("def get_config(): return 3", ["gives no config"]),
        ("get_config = 3", ["gives no config"]),
        ("\n1 / 0", ["mine.py:2: ZeroDivisionError"]),
        ("\n\ndef get_config(): raise KeyError('k')", ["mine.py:3: KeyError: 'k'"]),
        ("def get_config(:", ["mine.py:1: SyntaxError"]),
        ("import sys; sys.exit(0)", ["mine.py:1: SystemExit"]),
        (
            "from jaxinfra.config import *\ndef get_config(): ModelConfig(widht=3)",
            ["mine.py:2: TypeError", "'widht'; did you mean width?"],
        ),
        (
            "from jaxinfra.config import *\n"
            "def get_config():\n"
            "    return Config(name='a', train=TrainConfig(steps=3.0))",
            ["train.steps=3.0 must be an integer"],
        ),
    ],
)
def test_a_broken_config_file_is_a_config_error(source, parts, tmp_path):
    with pytest.raises(ConfigError) as error:
        options.load_config(write(tmp_path, source))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["", ".", "__init__", "x" * 5000, "a\0b", "../tiny"])
def test_a_name_that_is_not_shipped_is_refused(name):
    with pytest.raises(ConfigError, match="unknown config"):
        options.load_config(name)


@pytest.mark.parametrize("module", ["config", "options", "checks"])
def test_the_config_is_read_without_jax(module):
    code = (
        f"import sys, jaxinfra.{module};"
        "print({'jax', 'numpy'} & {name.partition('.')[0] for name in sys.modules})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.strip() == "set()", run.stderr


URL = "https://user:CANARY1@host:8443/sets/a?X-Amz-Signature=CANARY2"


def test_what_is_kept_of_a_config_has_no_secret_of_a_url():
    data = dataclasses.replace(CONFIG.data, path=URL, sets={"a": URL, "b": "s3://b/c"})
    config = dataclasses.replace(CONFIG, data=data)
    kept = options.recorded(config)
    assert "CANARY" not in json.dumps(kept)
    assert kept["data"]["path"] == "https://host:8443/sets/a?..."
    assert kept["data"]["sets"]["b"] == "s3://b/c"
    # The run goes on by the same command, with other credentials too.
    assert resuming.diff(options.from_json(kept), config) == []
    moved = dataclasses.replace(config, data=dataclasses.replace(data, path="s3://b"))
    [(key, was, now)] = resuming.diff(options.from_json(kept), moved)
    assert (key, was, now) == ("data.path", "https://host:8443/sets/a?...", "s3://b")


@pytest.mark.parametrize("key", ["init.from", "data.tokenizer"])
def test_a_folder_that_is_a_url_of_the_web_is_refused_without_its_secret(key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as error:
        options.read_command([f"--{key}={URL}"])
    assert "CANARY" not in str(error.value)
