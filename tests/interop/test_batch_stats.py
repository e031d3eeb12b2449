"""BatchNorm and running norms through our step, against plain flax and optax."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from interop import small_images
from interop.small_images import TX, LinenNet, NnxNet, bridged, make_batch, train

from jaxinfra import mesh as mesh_lib
from jaxinfra import sharding
from jaxinfra.interop import flax_bridge, running_norm

# The same sums in another program, grown by 5 steps of adam, whose first steps are of
# size 1 whatever the gradient.
FLOAT32_ROUNDING = 1e-5
KINDS = ("linen", "nnx")


def close(a, b, atol=FLOAT32_ROUNDING):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def key_of_step(k):
    """As the step folds it, and the bridge for a microbatch whose first row is 0."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(1), k), 0)


def plain_linen(params, model_state, *, rate, steps=5):
    """Flax and optax as their documents have them: (losses, params, batch_stats)."""
    net, opt_state, found = LinenNet("batch", rate), TX.init(params), []

    @functools.partial(jax.jit, compiler_options=small_images.QUICK)
    def step(params, stats, opt_state, batch, key):
        def mean_loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, changed = net.apply(
                variables, batch["image"], True, rngs=key, mutable=["batch_stats"]
            )
            ce, weights, _ = small_images.losses(logits, batch)
            return jnp.sum(ce * weights) / jnp.sum(weights), changed["batch_stats"]

        (value, stats), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, value

    stats = model_state["batch_stats"]
    for k in range(steps):
        params, stats, opt_state, value = step(
            params, stats, opt_state, make_batch(k), key_of_step(k)
        )
        found.append(float(value))
    return found, params, {"batch_stats": stats}


def plain_nnx(params, model_state, *, rate, steps=5):
    model = NnxNet(nnx.Rngs(0), norm="batch", rate=rate)
    for of_kind, values in ((nnx.Param, params), (nnx.BatchStat, model_state)):
        kept = nnx.state(model, of_kind)
        nnx.replace_by_pure_dict(kept, jax.tree.map(jnp.asarray, values))
        nnx.update(model, kept)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    model.train()
    found = []
    for k in range(steps):
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.RngState)):
            name = zlib.crc32("/".join(map(str, path)).encode())
            is_key = isinstance(variable, nnx.RngKey)
            fresh = jax.random.fold_in(key_of_step(k), name) if is_key else 0
            variable[...] = fresh
            nnx.update(model, nnx.from_flat_state([(path, variable)]))

        def mean_loss(model, batch):
            ce, weights, _ = small_images.nnx_loss(model, batch, True)
            return jnp.sum(ce * weights) / jnp.sum(weights)

        value, grads = nnx.value_and_grad(mean_loss)(model, make_batch(k))
        optimizer.update(model, grads)
        found.append(float(value))
    trained, stats = (nnx.state(model, of) for of in (nnx.Param, nnx.BatchStat))
    return found, nnx.to_pure_dict(trained), nnx.to_pure_dict(stats)


@pytest.mark.parametrize("kind", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_training_with_batch_norm_is_plain_flax_and_optax(kind):
    metrics, last, first = train(kind)
    plain = plain_linen if kind == "linen" else plain_nnx
    losses, params, stats = plain(first.params, first.model_state, rate=0.4)
    close([float(m["loss"]) for m in metrics], losses)
    close(last.params, params)
    close(last.model_state, stats)
    changed = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - b))), last.model_state, first.model_state
    )
    assert min(jax.tree.leaves(changed)) > 0.1, "running values must have moved"


# nnx with a running norm is what tests/e2e/test_own_task.py has.
@pytest.mark.parametrize(
    ("kind", "norm"), [("linen", "batch"), ("nnx", "batch"), ("linen", "running")]
)
@pytest.mark.slow
def test_four_devices_train_as_one(kind, norm):
    one, one_last, _ = train(kind, norm=norm)
    four, four_last, _ = train(kind, norm=norm, mesh="four")
    close([m["loss"] for m in four], [m["loss"] for m in one])
    close([m["accuracy"] for m in four], [m["accuracy"] for m in one])
    close(four_last.params, one_last.params)
    close(four_last.model_state, one_last.model_state)


def losses(*args, **settings):
    return [float(m["loss"]) for m in train(*args, **settings)[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_microbatches_do_not_change_a_running_norm(kind):
    close(losses(kind, norm="running", micro=3), losses(kind, norm="running"))


def test_microbatches_change_batch_norm_as_its_text_says():
    [one], [three] = (
        losses("linen", micro=micro, rate=0.0, steps=1) for micro in (1, 3)
    )
    assert abs(three - one) > 1e-3


def test_batch_norm_moves_once_a_step_by_the_mean_over_microbatches():
    _, last, first = train("linen", micro=3, rate=0.0, steps=1)
    batch, net, made = make_batch(0), LinenNet("batch"), []
    for part in range(3):
        _, changed = net.apply(
            {"params": first.params, **first.model_state},
            batch["image"][part::3],
            True,
            mutable=["batch_stats"],
        )
        made.append(changed)
    mean = jax.tree.map(lambda *values: sum(values) / 3, *made)
    close(last.model_state, mean)


@pytest.mark.slow
def test_microbatches_draw_different_dropout_masks():
    bridge = bridged("linen", rate=0.5)
    with jax.set_mesh(mesh_lib.make_mesh({}, devices=jax.devices()[:1])):
        batch = jax.tree.map(jnp.asarray, make_batch())
        params, model_state = bridge.init(jax.random.key(0), batch)
        values = [
            float(bridge.loss_fn(params, model_state, moved, jax.random.key(2))[0])
            for moved in (batch, batch, batch | {"row": batch["row"] + 1})
        ]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_the_statistics(norm):
    metrics, last, _ = train("linen", norm=norm, spoilt=(0, 1, 2, 3, 4))
    assert not any(m["is_finite"] for m in metrics)
    _, moved, first = train("linen", norm=norm)
    jax.tree.map(np.testing.assert_array_equal, last.model_state, first.model_state)
    changed = jax.tree.map(np.array_equal, moved.model_state, first.model_state)
    assert not all(jax.tree.leaves(changed))


@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_evaluation_uses_running_values_and_no_other_row(kind, norm):
    bridge = bridged(kind, norm=norm, rate=0.4)
    _, last, _ = train(kind, norm=norm)
    batch = make_batch(9)
    if kind == "linen":
        variables = {"params": last.params, **last.model_state}
        logits = LinenNet(norm).apply(variables, batch["image"], False)
    else:
        model = NnxNet(nnx.Rngs(0), norm=norm)
        for of_kind, values in (
            (nnx.Param, last.params),
            (nnx.filterlib.Any(nnx.BatchStat, running_norm.RunningStat), None),
        ):
            kept = nnx.state(model, of_kind)
            nnx.replace_by_pure_dict(kept, values or last.model_state)
            nnx.update(model, kept)
        model.eval()
        logits = model(batch["image"])
    expected, weights, _ = small_images.losses(logits, batch)

    def loss(rows):
        part = jax.tree.map(lambda x: jnp.asarray(x[rows]), batch)
        return bridge.loss_fn(last.params, last.model_state, part, None)[0]

    with jax.set_mesh(mesh_lib.make_mesh({}, devices=jax.devices()[:1])):
        whole, alone = loss(slice(None)), [loss(slice(i, i + 1)) for i in range(2)]
    np.testing.assert_allclose(whole, np.sum(expected * weights), rtol=1e-5)
    np.testing.assert_allclose(alone, (expected * weights)[:2], rtol=1e-5)


def test_running_statistics_are_the_mean_over_steps_that_weigh_less_with_age():
    rng = np.random.default_rng(0)
    parts = [rng.normal(50, 3, (7, 4)).astype(np.float32) for _ in range(3)]
    state = running_norm._first(4, 0.8)
    for x in parts:
        state = running_norm.updated(state, running_norm.sums(x, state["mean"]))
    ages = np.array([0.8**2, 0.8, 1.0])
    for name, of in (("mean", np.mean), ("var", np.var)):
        values = [of(x.astype(np.float64), axis=0) for x in parts]
        expected = np.average(values, axis=0, weights=ages)
        # The first step's squares are of distances from 0: 50**2 for a variance of 9.
        np.testing.assert_allclose(state[name], expected, rtol=1e-4)


def test_linen_and_nnx_running_norms_are_one():
    x = np.random.default_rng(0).normal(2, 3, (5, 2, 4)).astype(np.float32)
    linen, layer = running_norm.LinenRunningNorm(), running_norm.NnxRunningNorm(4)
    variables = linen.init(jax.random.key(0), x)
    y, seen = linen.apply(variables, x, mutable=[running_norm.SUMS])
    layer.train()
    np.testing.assert_array_equal(layer(x), y)
    for name, value in seen[running_norm.SUMS].items():
        np.testing.assert_array_equal(getattr(layer, name)[...], value)


def test_specs_of_flax_parameters_tell_what_decays():
    shapes = {
        "embed": {"embedding": (7, 4)},
        "dense": {"kernel": (4, 6), "bias": (6,)},
        "conv": {"kernel": (3, 3, 4, 8)},
    }
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    mesh = mesh_lib.make_mesh({"fsdp": 2}, devices=jax.devices()[:2])
    specs = flax_bridge.specs_for(params, sharding.make_layout(mesh))
    found = jax.tree.map(lambda s: (s.kind, s.contract, s.axes), specs)
    assert found == {
        "embed": {"embedding": ("embedding", (), (None, "embed"))},
        "dense": {
            "kernel": ("matrix", (0,), (None, "embed")),
            "bias": ("vector", (), ("embed",)),
        },
        "conv": {"kernel": ("matrix", (0, 1, 2), (None, None, None, "embed"))},
    }


@pytest.mark.parametrize("momentum", [1.0, 1.5, -0.1, float("nan")])
def test_a_momentum_that_keeps_all_or_more_is_refused_when_the_module_is_made(momentum):
    for make in (
        lambda: running_norm.LinenRunningNorm(momentum=momentum),
        lambda: running_norm.NnxRunningNorm(3, momentum=momentum),
    ):
        with pytest.raises(ValueError, match=f"momentum={momentum} of a running norm"):
            make()
