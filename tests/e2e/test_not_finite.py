"""A step whose loss or gradient is not finite changes nothing and is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from e2e import command

from jaxinfra import checks, experiment, options
from jaxinfra.train import objective
from jaxinfra.train import step as steps

# (factor of the loss, inside of a square root): the gradient of sqrt at 0 is not finite
# where the loss is.
GOOD = (1.0, 1.0)
BAD = {
    "a NaN loss": (np.nan, 1.0),
    "an infinite loss": (np.inf, 1.0),
    "a finite loss with an infinite gradient": (1.0, 0.0),
}


def _loss(params, model_state, batch, key):
    """A loss of any parameters, which a batch can spoil."""
    factor, inside = batch
    squares = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
    loss = factor * squares + jnp.sqrt(inside * squares)
    return loss, objective.Aux(jnp.float32(1.0), {}, {"seen": jnp.float32(1.0)})


def _build(optimizer: str):
    """(jitted step, first state) of a small model on one device."""
    argv = command.arguments({"optimizer.name": optimizer, "optimizer.ema_decay": 0.5})
    config = experiment.resolve(options.read_command(argv)[0], 257)
    checks.check(config)
    built = experiment.build(config, jax.devices()[:1])
    step = steps.make_train_step(
        objective.grad_of(_loss),
        built.tx,
        shardings=built.shardings,
        update_state=lambda model_state, stats: {
            "seen": model_state["seen"] + stats["seen"]
        },
    )
    whole = jax.NamedSharding(built.layout.mesh, jax.P())
    seen = {"seen": jax.device_put(np.float32(0), whole)}
    return built.layout.mesh, jax.jit(step), built.init, seen


def _bytes(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("muon", "adafactor")),
    ],
)
def test_a_spoilt_batch_leaves_every_leaf_bitwise_as_it_was(optimizer):
    mesh, step, init, seen = _build(optimizer)
    with jax.set_mesh(mesh):
        start = init()._replace(model_state=seen)
        first, metrics = step(start, tuple(map(jnp.float32, GOOD)))
        assert bool(metrics["is_finite"])
        assert float(first.model_state["seen"]) == 1.0
        assert _bytes(first.params) != _bytes(start.params)
        for name, batch in BAD.items():
            after, metrics = step(first, tuple(map(jnp.float32, batch)))
            assert not bool(metrics["is_finite"]), name
            assert _bytes(after._replace(step=first.step)) == _bytes(first), name
            # The step is counted: the stream of data goes on, not round.
            assert int(after.step) == int(first.step) + 1
            assert np.isfinite(float(metrics["param_norm"])), name


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_11_and_tells_each_step(cache, tmp_path):
    run_dir = tmp_path / "run"
    done = command.train(
        cache
        | {
            "run.dir": run_dir,
            "optimizer.learning_rate": 2e9,
            "train.max_bad_steps": 3,
            "train.save_every": 1,
        }
    )
    assert done.returncode == 11, done.stderr
    assert "Traceback" not in done.stderr
    told = [event["step"] for event in command.events(run_dir, "anomaly")]
    lines = command.metrics(run_dir)
    odd = [line["step"] for line in lines if not line["train/is_finite"]]
    assert told == odd
    # Three in a row, and not a step more in the records.
    assert told[-3:] == [told[-1] - 2, told[-1] - 1, told[-1]]
    assert lines[-1]["step"] == told[-1]
    assert None in (lines[-1]["train/loss"], lines[-1]["train/grad_norm"])
    # The parameters stood still meanwhile.
    norms = {line["train/param_norm"] for line in lines[told[-3] - 2 :]}
    assert len(norms) == 1
    assert command.events(run_dir, "end")[-1]["code"] == 11
