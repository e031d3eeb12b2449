"""A run goes from mesh to mesh, a pairwise sample of all that 8 devices can make: each
restores to the bit what the one before it saved, and trains on as one device does."""

import dataclasses

import jax
import numpy as np
import pytest
from parallel import hops, tiny_runs

from jaxinfra import experiment
from jaxinfra.data import batches, device

# One step on each mesh, since rounding grows: a last bit of the first parameters is
# 1e-5 of a gradient for 24 steps of the table's 16 layers and 1e-2 of the 26th step's,
# on one device alone. 16 rows: every device has one in each microbatch, or more.
LAYERS, ROWS = 8, 16


def pairs(meshes, chosen, choices):
    return {pair for case in chosen for pair in meshes.pairs(choices(case))}


def valid_cases(meshes):
    return [case for case in meshes.cases() if not meshes.refusal(case)]


def test_the_sample_has_nearly_all_pairs_that_so_many_cases_can_have(meshes):
    valid = valid_cases(meshes)
    chosen = meshes.sample(valid)
    assert len(chosen) == len(set(chosen)) == 25
    every = pairs(meshes, valid, meshes.named)
    assert pairs(meshes, chosen, meshes.named) == every
    assert len(every) == 90
    # With sizes no 25 cases have more than 129, by an integer program.
    assert len(pairs(meshes, valid, meshes.sized)) == 192
    assert len(pairs(meshes, chosen, meshes.sized)) >= 127


class Place:
    """Where a state is trained: a case of the table, or one device."""

    def __init__(self, config, documents):
        # A state of the model itself, which experts can have.
        rate = 1e-3 if config.model.num_experts else 0.0
        train = dataclasses.replace(
            config.train, batch_size=ROWS, router_bias_rate=rate, log_batch_digest=True
        )
        model = dataclasses.replace(config.model, repeats=LAYERS)
        config = dataclasses.replace(config, model=model, train=train)
        self.built = tiny_runs.build(config, documents)
        self.stream = batches.make_stream(
            documents.split("train"), length=train.length, batch_size=ROWS, seed=0
        )
        self.compiled = None

    def step(self, state, moment):
        """(state, metrics, first moments before and after)"""
        batch = device.to_device(
            self.stream.batch,
            int(state.step),
            batch_size=ROWS,
            sharding=experiment.batch_sharding(self.built.layout),
        )
        if self.compiled is None:
            lowered = self.built.train_step.lower(state, batch)
            self.compiled = lowered.compile(tiny_runs.QUICK)
        before = moment(self.built, state)
        state, metrics = self.compiled(state, batch)
        return state, jax.device_get(metrics), (before, moment(self.built, state))

    def restored(self, folder, saved, name):
        """The state in `folder`, which must be, here, what was `saved`."""
        state = hops.restored(folder, self.built)
        found = hops.on_host(self.built, state)
        assert found.keys() == saved.keys()
        for path, array in saved.items():
            is_same = found[path].tobytes() == array.tobytes()
            assert is_same, f"{name}: {path}"
            assert found[path].dtype == array.dtype, f"{name}: {path}"
        places = jax.tree.map(lambda like: like.sharding, self.built.abstract())
        assert jax.tree.map(lambda x: x.sharding, state) == places
        return state


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "experts"])
def test_each_mesh_goes_on_where_the_one_before_it_ended(
    meshes, documents, tmp_path, model
):
    alone, losses = Place(meshes.config_of(None, model), documents), []
    with jax.set_mesh(alone.built.layout.mesh):
        expected = alone.built.init()
        saved = hops.on_host(alone.built, expected)
        hops.save(tmp_path, alone.built, expected)
    of_model = {path for path in saved if path.startswith("model_state/")}
    assert bool(of_model) == (model == "experts")
    chain = [case for case in meshes.sample(valid_cases(meshes)) if case.model == model]
    for case in chain:
        with jax.set_mesh(alone.built.layout.mesh):
            expected, wanted, reference = alone.step(expected, meshes.moment)
            known = hops.on_host(alone.built, expected)
        here = Place(meshes.config_of(case, model), documents)
        with jax.set_mesh(here.built.layout.mesh):
            state = here.restored(tmp_path, saved, case.name)
            state, metrics, moments = here.step(state, meshes.moment)
            saved = hops.on_host(here.built, state)
            hops.save(tmp_path, here.built, state)
        for name in ("digest", "tokens"):
            np.testing.assert_array_equal(metrics[name], wanted[name], case.name)
        assert abs(metrics["loss"] - wanted["loss"]) <= meshes.LOSS, case.name
        apart = meshes.gradient_difference(moments, reference)
        assert apart <= meshes.GRADIENT, case.name
        for path in of_model | {"step", "key"}:
            np.testing.assert_array_equal(saved[path], known[path], case.name)
        losses.append(metrics["loss"])
    with jax.set_mesh(alone.built.layout.mesh):
        last = alone.restored(tmp_path, saved, "one device")
    assert int(last.step) == len(chain)
    assert losses[-1] < (1 - meshes.FALL) * losses[0], "it must have learned"
