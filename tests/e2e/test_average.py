"""A run with an average of its parameters: what is evaluated, saved and sampled."""

import math

import jax
import numpy as np
import pytest
from e2e import command

from jaxinfra import checks, experiment, options
from jaxinfra import params as params_lib
from jaxinfra.checkpoint import restore
from jaxinfra.interop import pretrained

pytestmark = pytest.mark.slow
STEPS = 10
FLOAT32 = 1e-6  # one rounding a step of a mean over ten


@pytest.fixture(scope="module")
def settings(cache):
    """A run that saves every step and evaluates every fifth."""
    every = {"train.steps": STEPS, "train.save_every": 1, "eval.every": 5}
    return cache | every | {"optimizer.ema_decay": 0.8}


@pytest.fixture(scope="module")
def averaged(settings, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("average") / "run"
    done = command.train(settings | {"run.dir": run_dir})
    assert done.returncode == 0, done.stderr
    return run_dir


def losses(run_dir, key):
    return [line[key] for line in command.metrics(run_dir) if key in line]


def build(settings, run_dir):
    argv = command.arguments(settings | {"run.dir": run_dir})
    config = experiment.resolve(options.read_command(argv)[0], 257)
    checks.check(config)
    return experiment.build(config, jax.devices()[:1])


def test_training_does_not_see_it_and_evaluation_does(settings, averaged, tmp_path):
    plain = tmp_path / "run"
    done = command.train(settings | {"run.dir": plain, "optimizer.ema_decay": 0})
    assert done.returncode == 0, done.stderr
    assert command.history(averaged) == command.history(plain)
    ours, theirs = (losses(folder, "eval/loss") for folder in (averaged, plain))
    assert len(ours) == 2
    # Ten steps in, a mean over about five of them lags behind.
    assert all(a > b for a, b in zip(ours, theirs, strict=True))


def saved(built, run_dir, step, part):
    """That part of a checkpoint, as a tree like the parameters."""
    abstract = built.abstract().params
    wanted = {
        f"{part}/{path}": leaf.update(dtype=np.float32)
        for path, leaf in params_lib.named(abstract)
    }
    found = restore.restore(run_dir / "checkpoints", step, wanted).arrays
    return params_lib.unflatten(abstract, jax.device_get(list(found.values())))


def test_it_is_the_mean_of_what_was_saved_and_what_is_generated_from(
    settings, averaged
):
    built = build(settings, averaged)
    with jax.set_mesh(built.layout.mesh):
        expected = jax.device_get(built.init().params)
        for step in range(1, STEPS + 1):
            params = saved(built, averaged, step, "params")
            average = saved(built, averaged, step, "opt_state/average")
            expected = jax.tree.map(lambda e, p: 0.8 * e + 0.2 * p, expected, params)
            jax.tree.map(
                lambda a, e: np.testing.assert_allclose(a, e, atol=FLOAT32),
                average,
                expected,
            )
        assert not np.array_equal(average["embedding"], params["embedding"])
        source = pretrained.open_source(str(averaged))
        used = source.load(layout=built.layout, dtype=np.float32)
        assert np.array_equal(used["embedding"], average["embedding"])


def test_a_resumed_run_has_the_same_average_bit_for_bit(settings, averaged, tmp_path):
    run_dir = command.copy_as_of(3, averaged, tmp_path / "run")
    done = command.train(settings | {"run.dir": run_dir})
    assert done.returncode == 0, done.stderr
    assert command.events(run_dir, "start")[-1]["step"] == 3
    assert command.history(run_dir) == command.history(averaged)
    for key in ("eval/loss", "eval/held_out/bits_per_byte"):
        found = losses(run_dir, key)
        assert found == losses(averaged, key)
        assert all(map(math.isfinite, found))
