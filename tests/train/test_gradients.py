"""Microbatches of unequal weight give the gradient of the whole batch; bad steps give
nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfra import experiment, mesh, options
from jaxinfra.plan.step import rows_of
from jaxinfra.train import accumulation, objective, state, step

ROWS, WIDTH = 8, 5
FLOAT32 = 1e-5  # sums of 8 terms in another order


@pytest.fixture(params=[1, 2])
def here(request):
    devices = jax.devices()[: request.param]
    with jax.set_mesh(mesh.make_mesh({"data": request.param}, devices=devices)) as m:
        yield m or jax.sharding.get_mesh()


def batch_on(mesh_, *, poison=False):
    """Rows and weights, of which two microbatches of four share almost nothing."""
    rng = np.random.default_rng(3)
    x_BD = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    weight_B = np.array([9, 0, 2, 0, 7, 1, 0, 30], np.float32)
    if poison:
        x_BD[3, 2] = np.nan
    rows = jax.NamedSharding(mesh_, jax.P("data"))
    return jax.device_put(x_BD, rows), jax.device_put(weight_B, rows)


def loss_fn(params, model_state, batch, key):
    x_BD, weight_B = batch
    error_B = jnp.einsum("BD,D->B", x_BD, params["w"]) - 1.0
    aux = objective.Aux(jnp.sum(weight_B), {"x": jnp.sum(weight_B * x_BD[:, 0])})
    return jnp.sum(weight_B * error_B**2), aux


def whole_by_hand(x_BD, weight_B, w_D):
    error_B = x_BD @ w_D - 1.0
    return (weight_B * error_B**2).sum(), 2 * (weight_B * error_B) @ x_BD


def params_on(mesh_):
    whole = jax.NamedSharding(mesh_, jax.P(None))
    w_D = np.linspace(-1, 1, WIDTH).astype(np.float32)
    return {"w": jax.device_put(w_D, whole)}, {"w": whole}


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_parts_of_unequal_weight_sum_to_the_whole(here, microbatches):
    batch, (params, places) = batch_on(here), params_on(here)
    fn = accumulation.accumulate(
        objective.grad_of(loss_fn), microbatches, shardings=places
    )
    found = jax.jit(fn)(params, (), batch, None)
    x_BD, weight_B = map(np.asarray, batch)
    loss_sum, grad = whole_by_hand(x_BD, weight_B, np.asarray(params["w"]))
    np.testing.assert_allclose(found.loss_sum, loss_sum, rtol=FLOAT32)
    np.testing.assert_allclose(found.grads["w"], grad, rtol=FLOAT32)
    assert float(found.aux.weight_sum) == 49.0
    weighted = (weight_B * x_BD[:, 0]).sum()
    np.testing.assert_allclose(found.aux.metrics["x"], weighted, rtol=FLOAT32)


@pytest.mark.slow
def test_two_microbatches_keep_the_activations_of_one():
    """As three do: a loop of a single turn would be none, and both be kept."""
    cfg = options.load_config("tiny")
    model = dataclasses.replace(cfg.model, vocab_size=64)
    bytes_of = {}
    for count in (1, 2, 3):
        train = {"batch_size": 8 * count, "microbatches": count, "remat": "none"}
        config = dataclasses.replace(
            cfg, model=model, train=dataclasses.replace(cfg.train, **train)
        )
        built = experiment.build(config, jax.devices()[:1])
        with jax.set_mesh(built.layout.mesh):
            batch = experiment.abstract_batch(built, rows_of(built))
            lowered = built.train_step.lower(built.abstract(), batch)
        compiled = lowered.compile({"xla_backend_optimization_level": 0})
        bytes_of[count] = compiled.memory_analysis().temp_size_in_bytes
    assert bytes_of[2] == pytest.approx(bytes_of[3], rel=0.05)
    assert bytes_of[2] < 1.3 * bytes_of[1]


def stepped(here, microbatches, *, poison=False, is_empty=False):
    batch, (params, places) = batch_on(here, poison=poison), params_on(here)
    if is_empty:
        batch = (batch[0], jax.tree.map(jnp.zeros_like, batch[1]))
    tx = optax.with_extra_args_support(optax.sgd(0.1, momentum=0.9))
    opt_state = tx.init(params)
    if is_empty:  # a momentum, which would move the parameters
        opt_state = jax.tree.map(lambda x: x + 1, opt_state)
    whole = jax.NamedSharding(here, jax.P())
    shardings = state.Shardings(
        params=places,
        grads=places,
        optimizer=places,
        opt_state=jax.tree.map(lambda x: places["w"], opt_state),
    )
    fn = accumulation.accumulate(
        objective.grad_of(loss_fn), microbatches, shardings=places
    )
    first = state.TrainState(
        step=jax.device_put(np.int32(4), whole),
        params=params,
        opt_state=opt_state,
        model_state=(),
        key=jax.device_put(np.zeros(2, np.uint32), whole),
    )
    return first, *jax.jit(step.make_train_step(fn, tx, shardings=shardings))(
        first, batch
    )


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_step_divides_once_by_the_weight_of_all(here, microbatches):
    first, after, metrics = stepped(here, microbatches)
    x_BD, weight_B = map(np.asarray, batch_on(here))
    w_D = np.asarray(first.params["w"])
    loss_sum, grad = whole_by_hand(x_BD, weight_B, w_D)
    np.testing.assert_allclose(metrics["loss"], loss_sum / 49, rtol=FLOAT32)
    norm = np.linalg.norm(grad / 49)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=FLOAT32)
    np.testing.assert_allclose(
        after.params["w"], w_D - 0.1 * grad / 49, rtol=FLOAT32, atol=1e-7
    )
    assert int(after.step) == 5


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_batch_without_a_target_changes_nothing_and_has_no_loss(here, microbatches):
    first, after, metrics = stepped(here, microbatches, is_empty=True)
    assert float(metrics["tokens"]) == 0
    assert bool(metrics["is_finite"]), "no sign of divergence"
    assert np.isnan(metrics["loss"])
    assert np.isnan(metrics["x"])
    jax.tree.map(
        np.testing.assert_array_equal,
        (first.params, first.opt_state),
        (after.params, after.opt_state),
    )
    assert int(after.step) == 5


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(here):
    first, after, metrics = stepped(here, 2, poison=True)
    assert not bool(metrics["is_finite"])
    for old, new in zip(
        jax.tree.leaves((first.params, first.opt_state)),
        jax.tree.leaves((after.params, after.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    assert int(after.step) == 5
