"""A task that is not text through scripts/train.py: the shipped digits, and files that
are wrong."""

import pytest
from e2e import command

STEPS = 12
SMALL = {
    "train.steps": STEPS,
    "train.save_every": 4,
    "train.batch_size": 48,
    "optimizer.learning_rate": 0.02,
    "train.log_batch_digest": "true",
    "optimizer.warmup_steps": 2,
    "model.width": 8,
    "eval.every": 6,
    "checkpoint.keep": 9,
}
# Sums of float32 over 4 devices in another order, grown by 12 steps of adam.
OTHER_MESH = 1e-4


def train(settings, config="digits_convnet"):
    """As `command.train`, of a config that is not text."""
    argv = [f"--{key}={value}" for key, value in settings.items()]
    return command.run(["--config", str(config), *argv])


@pytest.fixture(scope="module")
def quiet(cache, tmp_path_factory):
    """The folder of a run of the digits that nobody disturbed."""
    pytest.importorskip("sklearn")
    run_dir = tmp_path_factory.mktemp("digits") / "run"
    done = train(cache | SMALL | {"run.dir": run_dir})
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.slow
def test_digits_are_learned_and_metrics_are_those_of_images(quiet):
    lines = command.metrics(quiet)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.5
    assert lines[-1]["eval/held_out/accuracy"] > 0.4
    assert lines[-1]["eval/loss"] == lines[-1]["eval/held_out/loss"]
    assert lines[-1]["eval/held_out/tokens"] == 360
    names = set().union(*lines)
    assert {"train/accuracy", "perf/tokens_per_sec", "data/digest"} <= names
    assert not {"perf/mfu", "eval/held_out/bits_per_byte"} & names


@pytest.mark.slow
def test_a_restarted_run_of_digits_is_bit_equal_to_a_quiet_one(quiet, cache, tmp_path):
    run_dir = command.copy_as_of(4, quiet, tmp_path / "run")
    done = train(cache | SMALL | {"run.dir": run_dir})
    assert done.returncode == 0, done.stderr
    assert command.events(run_dir, "start")[-1]["step"] == 4
    assert command.history(run_dir) == command.history(quiet)
    arrays = [
        command.contents(folder / "checkpoints" / str(STEPS) / "arrays")
        for folder in (run_dir, quiet)
    ]
    assert any("running" in path or "norms" in path for path in arrays[0])
    assert arrays[0] == arrays[1]


@pytest.mark.slow
def test_digits_go_on_the_same_on_another_mesh_in_microbatches(quiet, cache, tmp_path):
    run_dir = command.copy_as_of(4, quiet, tmp_path / "run")
    changed = {
        "runtime.cpu_devices": 4,
        "mesh.fsdp": 2,
        "train.microbatches": 2,
        "run.dir": run_dir,
    }
    done = train(cache | SMALL | changed)
    assert done.returncode == 0, done.stderr
    ours, theirs = command.history(run_dir), command.history(quiet)
    losses, expected = ([line[1] for line in run] for run in (ours, theirs))
    assert losses == pytest.approx(expected, abs=OTHER_MESH, rel=0)
    assert [line[3] for line in ours] == [line[3] for line in theirs]


FILE = """
from jaxinfra.config import Config

def get_config():
    return Config(name="mine")

{get_task}
"""


@pytest.mark.parametrize(
    ("get_task", "argv", "message"),
    [
        ("def get_task(*pieces): return 3", {}, "gives int; it must give a jaxinfra."),
        ("get_task = 3", {}, "get_task is no function"),
        (
            "from jaxinfra.config import DataError\n"
            "def get_task(*pieces): raise DataError('no images here')",
            {},
            "no images here",
        ),
        (
            "def get_task(*pieces): raise SystemExit(9)",
            {"train.length": 7},
            "--train.length is for text, and config",
        ),
        ("", {"task": "own"}, "defines no get_task; set task to text"),
    ],
)
def test_a_wrong_task_is_refused_in_a_sentence(get_task, argv, message, tmp_path):
    file, run_dir = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(FILE.format(get_task=get_task))
    done = train({"run.dir": run_dir} | argv, config=file)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()
