"""float16: a loss scale that falls at an overflow, grows after good steps, and is part
of the state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import tiny_runs

from jaxinfra import experiment
from jaxinfra.data import batches, device
from jaxinfra.train import objective, optim

FLOAT16_LOSS = 1e-2  # 11 bits of mantissa, through two layers and a dozen updates
STEPS = 12


def config(precision, **kind):
    made = tiny_runs.tiny(precision=precision, **kind)
    return dataclasses.replace(
        made,
        model=dataclasses.replace(made.model, width=32, ffn_width=48),
        train=dataclasses.replace(made.train, batch_size=8, length=24),
        optimizer=dataclasses.replace(
            made.optimizer, schedule="constant", warmup_steps=0
        ),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.write_documents(tmp_path_factory.mktemp("documents") / "set")


def steps_of(built, data, state, start, count):
    """(state before, metrics, state after) of steps from `start` on."""
    train = built.config.train
    stream = batches.make_stream(
        data.split("train"), length=train.length, batch_size=train.batch_size, seed=0
    )
    step = None
    for k in range(start, start + count):
        batch = device.to_device(
            stream.batch,
            k,
            batch_size=train.batch_size,
            sharding=experiment.batch_sharding(built.layout),
        )
        if step is None:
            step = built.train_step.lower(state, batch).compile(tiny_runs.QUICK)
        before = jax.device_get(state)
        state, metrics = step(state, batch)
        yield before, jax.device_get(metrics), state


@pytest.mark.slow
def test_an_overflow_is_survived_and_the_loss_is_that_of_float32(data):
    built = tiny_runs.build(config("float16", microbatches=2), data)
    found = []
    with jax.set_mesh(built.layout.mesh):
        state = built.init()
        assert isinstance(state.model_state, objective.Scaled)
        huge = jax.device_put(np.float32(2.0**40), state.model_state.scale.sharding)
        state = state._replace(model_state=state.model_state._replace(scale=huge))
        skipped = 0
        for before, metrics, after in steps_of(built, data, state, 0, 60):
            scale = before.model_state.scale
            assert float(metrics["loss_scale"]) == scale
            assert np.isfinite(metrics["loss"])
            if metrics["is_finite"]:
                found.append(metrics["loss"])
                assert float(after.model_state.scale) == scale
                if len(found) == STEPS:
                    break
                continue
            skipped += 1
            assert objective.is_overflow(metrics), "the loop must not count it"
            assert float(after.model_state.scale) == scale / 2
            same = (before.params, before.opt_state)
            jax.tree.map(
                np.testing.assert_array_equal, same, (after.params, after.opt_state)
            )
    # From 2**40 it must fall below 2**16 at least; the rest is the model's.
    assert skipped >= 24
    assert len(found) == STEPS
    assert int(after.step) == skipped + STEPS

    exact = tiny_runs.build(config("float32"), data)
    with jax.set_mesh(exact.layout.mesh):
        state = exact.init()
        at = jax.device_put(np.int32(skipped), state.step.sharding)
        state = state._replace(step=at)
        rows = steps_of(exact, data, state, skipped, STEPS)
        expected = [metrics["loss"] for _, metrics, _ in rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT16_LOSS)
    assert not np.array_equal(found, expected), "it must be float16"
    assert expected[-1] < expected[0] - 0.5, "it must have learned"


def moved(scale, good_steps, is_finite, inner=(), stats=()):
    state = objective.Scaled(inner, jnp.float32(scale), jnp.int32(good_steps))
    after = objective.next_model_state(
        lambda model_state, stats: jax.tree.map(jnp.add, model_state, stats),
        state,
        stats,
        jnp.asarray(is_finite),
    )
    return float(after.scale), int(after.good_steps), after.inner


def test_the_scale_doubles_after_2000_good_steps_and_halves_after_a_bad_one():
    assert moved(8.0, 5, True)[:2] == (8.0, 6)
    assert moved(8.0, 1998, True)[:2] == (8.0, 1999)
    assert moved(8.0, 1999, True)[:2] == (16.0, 0)
    assert moved(8.0, 1999, False)[:2] == (4.0, 0)
    assert moved(0.5, 7, False)[:2] == (0.25, 0), "below 1 too"
    assert moved(objective.LARGEST_SCALE, 1999, True)[0] == objective.LARGEST_SCALE
    assert moved(objective.SMALLEST_SCALE, 0, False)[0] == objective.SMALLEST_SCALE


def test_the_rest_of_the_model_state_moves_with_good_steps_alone():
    inner, stats = {"seen": jnp.float32(2)}, {"seen": jnp.float32(3)}
    assert float(moved(8.0, 0, True, inner, stats)[2]["seen"]) == 5
    assert float(moved(8.0, 0, False, inner, stats)[2]["seen"]) == 2


def test_only_an_overflow_that_can_be_cured_is_one():
    good = {"loss": 3.0, "loss_scale": 2.0}
    assert objective.is_overflow(good)
    assert not objective.is_overflow(good | {"loss": float("inf")})
    assert not objective.is_overflow(good | {"loss_scale": objective.SMALLEST_SCALE})
    assert not objective.is_overflow({"loss": 3.0}), "no scale, no excuse"


def test_gradients_and_loss_are_unscaled_and_the_loss_sees_its_own_state():
    def loss_fn(params, model_state, batch, key):
        loss_sum = jnp.sum(params["w"] * batch) * model_state["factor"]
        return loss_sum, objective.Aux(jnp.float32(4), {"x": jnp.float32(8)})

    params, batch = {"w": jnp.ones(3)}, jnp.arange(3.0)
    inner = {"factor": jnp.float32(2)}
    state = objective.Scaled(inner, jnp.float32(2.0**-5), jnp.int32(0))
    grad_fn = objective.grad_of(loss_fn)
    found = grad_fn(params, state, batch, None)
    expected = grad_fn(params, inner, batch, None)
    np.testing.assert_array_equal(found.grads["w"], 2 * np.arange(3))
    np.testing.assert_array_equal(found.grads["w"], expected.grads["w"])
    assert float(found.loss_sum) == float(expected.loss_sum) == 6
    assert {k: float(v) for k, v in found.aux.metrics.items()} == {"x": 8.0}
    told = objective.loss_scale_of(state)
    assert {k: float(v) for k, v in told.items()} == {"loss_scale": 2.0**-5}
    assert objective.loss_scale_of(inner) == {}


@pytest.mark.parametrize("mesh", ["one device", "fsdp 4 x tensor 2"])
@pytest.mark.slow
def test_the_state_that_is_made_is_the_one_restored_into(data, mesh):
    built = tiny_runs.build(config("float16", mesh=mesh), data)
    with jax.set_mesh(built.layout.mesh):
        state = built.init()
    abstract = built.abstract()
    assert float(state.model_state.scale) == built.policy.loss_scale
    for leaf, like in zip(
        jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    assert optim.averaged(state.opt_state, state.params) is state.params
