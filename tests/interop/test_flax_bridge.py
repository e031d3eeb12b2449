"""Linen and nnx modules on our step, against flax's own gradients and one device."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxinfra import mesh as mesh_lib
from jaxinfra import sharding
from jaxinfra.interop import flax_bridge
from jaxinfra.train import accumulation, objective
from jaxinfra.train import state as state_lib
from jaxinfra.train import step as step_lib

# Sums over 4 devices in another order, grown by 8 steps of adam.
REDUCTION_ORDER = 1e-5
FLOAT32_ROUNDING = 1e-6
# Optimising these programs takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0}
B, D, F, C = 8, 6, 12, 4


class LinenMlp(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.relu(nn.Dense(F)(x))
        x = nn.Dropout(self.rate, deterministic=deterministic)(x)
        return nn.Dense(C)(x)


class NnxMlp(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.first = nnx.Linear(D, F, rngs=rngs)
        self.second = nnx.Linear(F, C, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs) if rate else lambda x: x

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.first(x))))


def linen_loss(model, batch, is_training):
    logits = model(batch["x"], deterministic=not is_training)
    return _losses(logits, batch)


def nnx_loss(model, batch, is_training):
    return _losses(model(batch["x"]), batch)


def _losses(logits, batch):
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return ce, batch["weight"]


def row_ids(batch):
    return batch["row"]


def make_bridged(kind, rate=0.0):
    rows = row_ids if rate else None
    if kind == "linen":
        return flax_bridge.from_linen(LinenMlp(rate), linen_loss, rows=rows)
    return flax_bridge.from_nnx(lambda rngs: NnxMlp(rngs, rate), nnx_loss, rows=rows)


def make_batch(rules=None):
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(B, D)).astype(np.float32),
        "y": rng.integers(0, C, B),
        "weight": rng.integers(0, 3, B).astype(np.float32),
        "row": np.arange(B, dtype=np.uint32),
    }
    if rules is None:
        return batch
    return jax.tree.map(
        lambda x: jax.device_put(x, sharding.spec(rules, "batch")), batch
    )


def train(bridged, sizes, *, zero=3, micro=1, steps=8):
    """(losses, final parameters as numpy, shardings)."""
    count = int(np.prod(list(sizes.values())))
    mesh = mesh_lib.make_mesh(sizes, devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        layout = sharding.make_layout(mesh, zero=zero)
        batch = make_batch(layout.params)
        tx = optax.with_extra_args_support(optax.adamw(3e-2))
        params, model_state = jax.jit(bridged.init)(jax.random.key(0), batch)
        shardings = flax_bridge.shardings_for(params, tx, layout)
        params = jax.device_put(params, shardings.params)
        grad_fn = objective.grad_of(bridged.loss_fn)
        grad_fn = accumulation.accumulate(grad_fn, micro, shardings=shardings.grads)
        step = step_lib.make_train_step(grad_fn, tx, shardings=shardings)
        step = jax.jit(step, compiler_options=QUICK)
        key = jax.random.key_data(jax.random.key(1))
        opt_state = state_lib.init_opt_state(tx, params, shardings)
        state = state_lib.TrainState(jnp.int32(0), params, opt_state, model_state, key)
        losses = []
        for _ in range(steps):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return losses, jax.tree.map(np.asarray, state.params), shardings


@pytest.fixture
def one_device():
    with jax.set_mesh(mesh_lib.make_mesh({}, devices=jax.devices()[:1])):
        yield


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.slow
def test_a_flax_mlp_trains_the_same_on_four_devices_as_on_one(kind):
    bridged = make_bridged(kind)
    one, one_params, _ = train(bridged, {})
    four, four_params, shardings = train(bridged, {"data": 2, "fsdp": 2})
    assert one[-1] < 0.7 * one[0]
    np.testing.assert_allclose(four, one, atol=REDUCTION_ORDER)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=REDUCTION_ORDER),
        four_params,
        one_params,
    )
    specs = {tuple(s.spec) for s in jax.tree.leaves(shardings.params)}
    assert (None, ("fsdp", "expert", "context")) in specs  # the kernels are split


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_gradients_are_flax_own(kind):
    batch = make_batch()
    if kind == "linen":
        bridged = make_bridged(kind)
        params = LinenMlp().init(jax.random.key(3), batch["x"])["params"]

        def mean(params):
            ce, weights = _losses(
                LinenMlp().apply({"params": params}, batch["x"]), batch
            )
            return jnp.sum(ce * weights)

        expected_loss, expected = jax.value_and_grad(mean)(params)
    else:
        module = NnxMlp(nnx.Rngs(3))
        bridged = flax_bridge.from_nnx(module, nnx_loss)

        def mean(module):
            ce, weights = _losses(module(batch["x"]), batch)
            return jnp.sum(ce * weights)

        expected_loss, grads = nnx.value_and_grad(mean)(module)
        expected = nnx.to_pure_dict(grads)
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2}, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        layout = sharding.make_layout(mesh)
        placed = make_batch(layout.params)
        if kind == "nnx":
            params, _ = bridged.init(jax.random.key(9), placed)
        tx = optax.sgd(0.1)
        places = flax_bridge.shardings_for(params, tx, layout).params
        params = jax.device_put(jax.tree.map(np.asarray, params), places)
        result = jax.jit(objective.grad_of(bridged.loss_fn))(params, {}, placed, None)
        for grad, place in zip(
            jax.tree.leaves(result.grads), jax.tree.leaves(places), strict=True
        ):
            assert jax.typeof(grad).sharding.spec == place.spec
    np.testing.assert_allclose(result.loss_sum, expected_loss, rtol=FLOAT32_ROUNDING)
    assert result.aux.weight_sum == batch["weight"].sum()
    assert jax.tree.structure(result.grads) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        result.grads,
        expected,
    )


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.slow
def test_dropout_is_the_same_on_every_mesh_and_for_any_number_of_microbatches(kind):
    bridged = make_bridged(kind, rate=0.5)
    one, _, _ = train(bridged, {}, steps=3)
    four, _, _ = train(bridged, {"data": 2, "fsdp": 2}, zero=1, micro=2, steps=3)
    np.testing.assert_allclose(four, one, atol=REDUCTION_ORDER)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.slow
def test_dropout_masks_differ_by_row_by_key_and_are_off_without_a_key(kind, one_device):
    bridged = make_bridged(kind, rate=0.5)
    batch = jax.tree.map(jnp.asarray, make_batch())
    alike = {name: jnp.stack([x[0]] * B) for name, x in batch.items()}
    alike |= {"row": batch["row"], "weight": jnp.ones(B)}
    params, model_state = bridged.init(jax.random.key(0), batch)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def row_loss(row, key):
        weight = (jnp.arange(B) == row).astype(jnp.float32)
        return bridged.loss_fn(params, model_state, alike | {"weight": weight}, key)[0]

    by_row = [row_loss(row, jax.random.key(0)) for row in range(B)]
    again = row_loss(0, jax.random.key(0))
    other_key = row_loss(0, jax.random.key(1))
    off = {float(row_loss(row, None)) for row in range(2)}
    assert len({float(x) for x in by_row}) > B // 2
    assert by_row[0] == again != other_key
    assert len(off) == 1


def test_two_nnx_dropout_layers_draw_different_masks(one_device):
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Dropout(0.5, rngs=rngs)
            self.second = nnx.Dropout(0.5, rngs=rngs)

    def loss(model, batch, is_training):
        ones = jnp.ones((1, 64))
        differ = jnp.sum(model.first(ones) != model.second(ones), axis=1)
        return differ.astype(jnp.float32), jnp.ones(1)

    bridged = flax_bridge.from_nnx(Twice, loss, rows=row_ids)
    key = jax.random.key(0)
    total, _ = bridged.loss_fn({}, {}, {"row": jnp.arange(1)}, key)
    assert 10 < total < 54


def test_dropout_without_row_ids_is_an_error(one_device):
    for bridged in (
        flax_bridge.from_linen(LinenMlp(0.5), linen_loss),
        flax_bridge.from_nnx(lambda rngs: NnxMlp(rngs, 0.5), nnx_loss),
    ):
        batch = jax.tree.map(jnp.asarray, make_batch())
        params, model_state = bridged.init(jax.random.key(0), batch)
        with pytest.raises(ValueError, match="pass rows="):
            bridged.loss_fn(params, model_state, batch, jax.random.key(0))


def test_batch_statistics_are_refused_with_the_rule_and_the_fix(one_device):
    class LinenBatchNorm(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            return nn.Dense(C)(nn.BatchNorm(use_running_average=deterministic)(x))

    fix = "merge in any order, or LayerNorm.*allow them by batch_stats='per_micro"
    bridged = flax_bridge.from_linen(LinenBatchNorm(), linen_loss)
    with pytest.raises(ValueError, match=f"'batch_stats'.*{fix}"):
        bridged.init(jax.random.key(0), jax.tree.map(jnp.asarray, make_batch()))
    with pytest.raises(ValueError, match=f"nnx.BatchStat.*{fix}"):
        flax_bridge.from_nnx(lambda rngs: nnx.BatchNorm(D, rngs=rngs), nnx_loss)


def test_an_nnx_module_that_changes_a_variable_is_refused_by_its_path(one_device):
    class Counter(nnx.Module):
        def __init__(self, rngs):
            self.calls = nnx.Variable(jnp.zeros(()))

    def loss(model, batch, is_training):
        model.calls[...] = model.calls[...] + 1
        return jnp.zeros(B), jnp.ones(B)

    bridged = flax_bridge.from_nnx(Counter, loss)
    params, model_state = bridged.init(jax.random.key(0), {})
    with pytest.raises(ValueError, match="variable calls"):
        bridged.loss_fn(params, model_state, {}, None)


def test_losses_and_weights_of_two_shapes_are_refused(one_device):
    def loss(model, batch, is_training):
        return jnp.zeros(B), jnp.ones(())

    bridged = flax_bridge.from_linen(LinenMlp(), loss)
    with pytest.raises(ValueError, match=r"shape \(8,\) and weights of shape \(\)"):
        bridged.loss_fn({}, {}, {}, None)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [(0, (None, None, None)), (1, (None, None, 1)), (3, (1, 1, 1))],
)
def test_zero_levels_place_arrays_without_specs(zero, expected):
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 4})
    params = {"odd": jnp.ones((3, 5)), "w": jnp.ones((4, 8)), "s": jnp.ones(())}
    tx = optax.sgd(0.1, momentum=0.9)
    places = flax_bridge.shardings_for(
        params, tx, sharding.make_layout(mesh, zero=zero)
    )
    moments = places.opt_state[0].trace
    for tree, dim in zip((places.params, places.grads, moments), expected, strict=True):
        axes = [None, None] if dim is None else [None, ("fsdp", "expert", "context")]
        assert list(tree["w"].spec) == axes
        assert list(tree["odd"].spec) == [None, None]
        assert list(tree["s"].spec) == []
