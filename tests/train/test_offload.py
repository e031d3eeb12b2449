"""Optimizer state on the host between steps."""

import jax
import numpy as np
import pytest
from e2e import command

from jaxinfra import experiment, options
from jaxinfra.config import ConfigError
from jaxinfra.data import packing
from jaxinfra.train import offload

TINY = (
    "--model.vocab_size", "264", "--model.width", "16", "--model.ffn_width", "24",
    "--model.num_heads", "2", "--model.num_kv_heads", "2", "--model.repeats", "2",
    "--train.batch_size", "4", "--train.length", "8", "--mesh.fsdp", "2",
    "--mesh.data", "2",
)  # fmt: skip


def kinds(state):
    return jax.tree.map(lambda x: x.sharding.memory_kind, state)


def two_steps(*changes):
    """The state after two steps, and their losses."""
    config, _ = options.read_command(["--config", "tiny", *TINY, *changes])
    built = experiment.build(config, jax.devices()[:4])
    like = kinds(built.abstract())
    tokens = np.random.default_rng(0).integers(1, 257, (4, 9)).astype(np.uint16)
    batch = packing.Batch(tokens, np.full((4, 4), 9, np.uint16))
    losses = []
    with jax.set_mesh(built.layout.mesh):
        state = built.init()
        # What a step is given, and a save is restored to, is where it leaves it.
        assert kinds(state) == like
        batch = jax.device_put(batch, experiment.batch_sharding(built.layout))
        for _ in range(2):
            state, metrics = built.train_step(state, batch)
            losses.append(float(metrics["loss"]))
            assert kinds(state) == like
    return state, losses


@pytest.mark.parametrize(
    "given", [("--optimizer.offload", "true"), ("--train.remat", "offload:query")]
)
def test_devices_without_memory_of_the_host_are_told_by_key(given, monkeypatch):
    monkeypatch.setattr(offload, "HOST", "host_of_no_device")
    key = given[0][2:]
    with pytest.raises(ConfigError, match=f"{key} offloads: .*set {key} to"):
        two_steps(*given)


@pytest.mark.slow
def test_the_optimizers_state_rests_on_the_host_and_the_numbers_are_the_same():
    state, losses = two_steps("--optimizer.offload", "true")
    assert set(jax.tree.leaves(kinds(state.opt_state))) == {offload.HOST}
    rest = jax.tree.leaves(kinds((state.params, state.step)))
    assert offload.HOST not in rest
    plain, expected = two_steps()
    assert losses == expected
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)


@pytest.mark.slow
def test_a_run_goes_on_with_its_optimizer_elsewhere(tmp_path):
    """Five steps on the host, saved, five more on the device: a quiet run's losses."""

    def run(name, **changes):
        settings = {"run.dir": tmp_path / name, "data.cache_dir": tmp_path / "cache"}
        done = command.train(settings | {"train.save_every": 5} | changes)
        assert done.returncode == 0, done.stderr
        lines = command.metrics(tmp_path / name)
        return [line["train/loss"] for line in lines]

    steps = "train.steps"
    quiet = run("quiet", **{steps: 10})
    first = run("moved", **{steps: 5, "optimizer.offload": "true"})
    assert first == quiet[:5]
    assert run("moved", **{steps: 10, "optimizer.offload": "false"}) == quiet
    assert run("moved", **{steps: 12, "optimizer.offload": "true"})[:10] == quiet
