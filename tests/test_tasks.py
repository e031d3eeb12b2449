"""A task of plain functions through `experiment.train`: no text, no flax."""

import dataclasses
import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra import config as c
from jaxinfra import experiment, params, sharding, tasks
from jaxinfra.data import examples
from jaxinfra.resilience import ownership
from jaxinfra.train import facts
from jaxinfra.train.objective import Aux

D, ROWS, HELD_OUT = 8, 96, 10
WEIGHTS_D = np.linspace(-1, 1, D, dtype=np.float32)
# Sums over 8 devices in another order, through 6 steps of adam.
OTHER_MESH = 1e-5


def linear(config, layout, policy, *, first=None):
    """Least squares; the model state counts the rows that were seen."""
    inputs = np.random.default_rng(0).normal(size=(ROWS + HELD_OUT, D))
    inputs = inputs.astype(np.float32)
    labels = inputs @ WEIGHTS_D
    specs = {
        "w": params.ParamSpec((D,), ("embed",), (0,), "vector", params.constant(0.0))
    }

    def loss_fn(weights, model_state, batch, key):
        w_D = jax.reshard(weights["w"], jax.P())
        out = sharding.spec(layout.params, "batch")
        made_B = jnp.einsum("BD,D->B", batch.inputs, w_D, out_sharding=out)
        error_B = (made_B - batch.labels) ** 2 * batch.weights_B
        stats = {"rows": jnp.sum(batch.weights_B)}
        metrics = {"is_near": jnp.sum((error_B < 0.1) * batch.weights_B)}
        return jnp.sum(error_B), Aux(jnp.sum(batch.weights_B), metrics, stats)

    size = config.train.batch_size
    return tasks.Task(
        specs=specs,
        loss_fn=loss_fn,
        first=first or (lambda key: ({"w": jnp.zeros(D)}, {"rows": jnp.zeros(())})),
        update_state=lambda state, stats: {"rows": state["rows"] + stats["rows"]},
        observe=lambda batch: {"largest": jnp.max(jnp.abs(batch.labels))},
        stream=examples.make_stream(
            inputs[:ROWS], labels[:ROWS], batch_size=size, seed=config.run.seed
        ),
        eval_sets={
            "held_out": examples.make_evaluation(
                inputs[ROWS:], labels[ROWS:], batch_size=size
            )
        },
        unit="point",
        flops_per_row=6.0 * D,
        ending=lambda weights, _: f"w: {np.round(np.asarray(weights['w']), 2)}",
    )


def settings(run_dir, mesh, *, steps=6, microbatches=1):
    return c.Config(
        name="linear",
        run=c.RunConfig(dir=str(run_dir)),
        train=c.TrainConfig(
            steps=steps, batch_size=16, save_every=3, microbatches=microbatches
        ),
        optimizer=c.OptimizerConfig(
            learning_rate=0.1, schedule="constant", warmup_steps=0
        ),
        eval=c.EvalConfig(every=3),
        mesh=mesh,
    )


def metrics(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("linear") / "quiet"
    assert experiment.train(settings(run_dir, c.MeshConfig(data=8)), linear) == 0
    return metrics(run_dir)


def test_plain_functions_train_and_tell_their_own_metrics(quiet):
    assert quiet[-1]["eval/loss"] < 0.5 * quiet[2]["eval/loss"]
    assert quiet[-1]["eval/held_out/tokens"] == HELD_OUT
    assert 0 <= quiet[-1]["eval/held_out/is_near"] <= 1
    assert {"train/is_near", "train/largest", "perf/mfu"} <= set(quiet[-1])
    assert quiet[-1]["eval/loss"] == quiet[-1]["eval/held_out/loss"]


def test_it_goes_on_on_another_mesh_with_its_model_state(quiet, tmp_path, capsys):
    half = settings(tmp_path, c.MeshConfig(data=2, fsdp=4), steps=3, microbatches=2)
    assert experiment.train(half, linear) == 0
    whole = settings(tmp_path, c.MeshConfig(fsdp=8))
    assert experiment.train(whole, linear) == 0
    assert "w: [" in capsys.readouterr().err
    found = metrics(tmp_path)
    losses = [[line["train/loss"] for line in run] for run in (found, quiet)]
    np.testing.assert_allclose(*losses, atol=OTHER_MESH)

    built = experiment.build(dataclasses.replace(whole, task="own"), get_task=linear)
    with jax.set_mesh(built.layout.mesh):
        like = built.abstract()
        assert jax.tree.map(lambda x: x.shape, like.model_state) == {"rows": ()}
        first = jax.tree.map(jnp.shape, built.init())
    assert first == jax.tree.map(lambda x: x.shape, like)


def test_who_is_fenced_before_its_start_takes_no_metrics_back(tmp_path, monkeypatch):
    """A run that stalled while it restored, and was taken over in that time."""
    config = settings(tmp_path, c.MeshConfig(data=8), steps=3)
    assert experiment.train(config, linear) == 0
    later = '{"step": 4}\n'  # as the successor writes them

    def taken_over(*args):
        (tmp_path / "owner.9.json").write_text("{}")
        with open(tmp_path / "metrics.jsonl", "a") as lines:
            lines.write(later)
        return {}

    monkeypatch.setattr(facts, "bytes_at_rest", taken_over)
    with pytest.raises(ownership.Fenced, match="the folder attempt 9"):
        experiment.train(config, linear)
    assert (tmp_path / "metrics.jsonl").read_text().endswith(later)


def test_other_parameters_than_saved_are_refused(quiet, tmp_path):
    from jaxinfra.checkpoint.commits import IncompatibleCheckpoint

    config = settings(tmp_path, c.MeshConfig(data=8), steps=3)
    assert experiment.train(config, linear) == 0
    more = lambda key: ({"w": jnp.zeros(D)}, {"rows": jnp.zeros(2)})
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=6)
    )
    with pytest.raises(IncompatibleCheckpoint, match="model_state/rows"):
        experiment.train(config, functools.partial(linear, first=more))


def test_keys_of_text_are_not_checked_for_another_task(tmp_path, caplog):
    """The defaults of the text model do not divide over tensor 8."""
    config = settings(tmp_path, c.MeshConfig(data=1, tensor=8), steps=1)
    with caplog.at_level(logging.ERROR):
        assert experiment.train(config, linear) == 0


def test_a_task_without_a_stream_can_be_built_and_not_trained(tmp_path):
    def dry(config, layout, policy):
        return linear(config, layout, policy)._replace(stream=None)

    config = settings(tmp_path / "run", c.MeshConfig(data=8))
    assert experiment.build(config, get_task=dry).task.stream is None
    with pytest.raises(c.ConfigError, match="'linear' has no stream"):
        experiment.train(config, dry)
    assert not (tmp_path / "run").exists()
