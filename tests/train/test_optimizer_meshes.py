"""Every optimizer gives on a mesh what it gives on one device, with its state sharded
as its parameters, or whole where it has another shape."""

import dataclasses

import numpy as np
import pytest
from parallel import tiny_runs

from jaxinfra import params
from jaxinfra.config import MeshConfig

LOSS = 1e-5  # float32 sums in another order, carried through six updates
RATES = {"lion": 1e-3, "adafactor": 1e-2, "sgd": 0.05}  # adamw and muon: test_meshes
ONE = MeshConfig(data=1)
FOUR = MeshConfig(data=1, fsdp=2, tensor=2)


def config(optimizer, mesh, zero):
    made = tiny_runs.tiny(optimizer=optimizer)
    return dataclasses.replace(
        made,
        model=dataclasses.replace(made.model, width=32, ffn_width=48),
        train=dataclasses.replace(made.train, steps=6, batch_size=8, length=24),
        optimizer=dataclasses.replace(
            made.optimizer,
            learning_rate=RATES[optimizer],
            warmup_steps=2,
            ema_decay=0.9,
        ),
        mesh=mesh,
        zero=zero,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.write_documents(tmp_path_factory.mktemp("documents") / "set")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "zero"),
    [(name, zero) for name in RATES for zero in range(4)],
)
def test_six_steps_are_those_of_one_device(data, optimizer, zero):
    expected = tiny_runs.run(config(optimizer, ONE, zero), data)
    found = tiny_runs.run(config(optimizer, FOUR, zero), data)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0, atol=LOSS)
    assert expected["loss"][-1] < expected["loss"][0] - 0.3, "it must have learned"


@pytest.mark.parametrize("optimizer", RATES)
def test_moments_and_the_average_lie_as_their_parameters(data, optimizer):
    built = tiny_runs.build(config(optimizer, FOUR, 3), data)
    state = built.abstract()
    places = {path: leaf.sharding for path, leaf in params.named(state.params)}
    leaves = dict(params.named(state.opt_state))
    for path, place in places.items():
        assert leaves[f"average/{path}"].sharding == place
    if optimizer != "adafactor":
        moment = {"lion": "mu", "sgd": "trace"}[optimizer]
        found = {
            name.partition(f"/{moment}/")[2]: leaf.sharding
            for name, leaf in leaves.items()
            if f"/{moment}/" in name
        }
        assert found == places
        return
    factored = sum(leaf.size for name, leaf in leaves.items() if "average" not in name)
    average = sum(leaf.size for name, leaf in leaves.items() if "average" in name)
    assert factored < average / 4, "even in so small a model"
    assert all(
        leaf.sharding.is_fully_replicated
        for name, leaf in leaves.items()
        if "average" not in name
    )
