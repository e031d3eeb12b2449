"""What layers of experts tell, on its way to the loss, the metrics and the biases; and
a run with biases that is read again."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra import mesh as mesh_lib
from jaxinfra import options, params, precision, sharding
from jaxinfra.config import Config, LayerConfig, ModelConfig, TrainConfig
from jaxinfra.generate import score
from jaxinfra.models import transformer
from jaxinfra.ops import attention, loss, seam
from jaxinfra.ops.experts import Told
from jaxinfra.parallel import expert
from jaxinfra.train import objective, routers

FLOAT32_ROUNDING = 2e-5  # log-likelihoods of 12 tokens, each about 3
EXPERTS = LayerConfig(feed_forward="experts")
MODEL = ModelConfig(
    vocab_size=19,
    width=16,
    ffn_width=24,
    num_heads=4,
    num_kv_heads=2,
    prefix=(LayerConfig(),),
    pattern=(EXPERTS, LayerConfig()),
    repeats=2,
    suffix=(EXPERTS,),
    num_experts=4,
    experts_per_token=2,
)
CONFIG = Config(
    name="routed",
    model=MODEL,
    train=TrainConfig(balance_loss=0.5, router_z_loss=0.25, router_bias_rate=0.1),
)


def told(number, *stack):
    """One layer's figures of 2 rows, all of them `number` or a multiple."""
    row = jnp.full((*stack, 2), float(number))
    load = jnp.arange(4.0) + 10 * number
    return Told(row, 2 * row, row, 0 * row, row, jnp.broadcast_to(load, (*stack, 2, 4)))


def test_losses_are_summed_over_layers_and_metrics_are_means_over_them():
    found = routers.Routers(CONFIG).summed(
        {"prefix": [None], "pattern": [told(1, 2), None], "suffix": [told(4)]}
    )
    balance = 2 * (1 + 1 + 4)  # two rows
    assert found.loss == 0.5 * balance + 0.25 * 2 * balance
    assert found.metrics["router_balance"] == balance / 3
    assert found.metrics["router_z"] == 2 * balance / 3
    load_LE = np.zeros((6, 4))
    load_LE[[1, 3]] = 2 * (np.arange(4) + 10)
    load_LE[5] = 2 * (np.arange(4) + 40)
    np.testing.assert_array_equal(found.stats["router_bias"], load_LE)


def test_biases_move_against_the_load_and_stay_where_there_are_no_experts():
    own = routers.Routers(CONFIG)
    load_LE = jnp.zeros((6, 4)).at[1].set(jnp.asarray([4.0, 0.0, 2.0, 2.0]))
    state = own.update_state(own.first_state(), {"router_bias": load_LE})
    np.testing.assert_allclose(state["router_bias"][1], [-0.1, 0.1, 0.0, 0.0])
    assert not state["router_bias"][0].any()
    without = dataclasses.replace(CONFIG, train=TrainConfig())
    assert routers.Routers(without).first_state() == ()


@pytest.fixture(scope="module")
def trained():
    """A model, its loss and parameters, and biases large enough to decide choices."""
    layout = sharding.make_layout(mesh_lib.make_mesh({}, devices=jax.devices()[:1]))
    policy = precision.policy("float32")
    with jax.set_mesh(layout.mesh):
        how = {"policy": policy, "rules": layout.params}
        ops = seam.Ops(
            seam.make_einsum(**how),
            attention.make_attend(layout.params),
            expert.make_dispatch(MODEL, **how),
        )
        model = transformer.make_model(MODEL, ops=ops, **how)
        loss_fn = objective.next_token_loss(
            model,
            loss.LossConfig(vocab_size=19, **how),
            routers=routers.Routers(CONFIG),
        )
        weights = params.initialize(
            model.specs, jax.random.key(0), layout=layout, dtype=jnp.float32
        )
        bias_LE = jnp.tile(jnp.asarray([0.0, 0.5, 0.0, -0.5]), (6, 1))
        yield types.SimpleNamespace(
            layout=layout,
            policy=policy,
            weights=weights,
            bias=bias_LE,
            loss=objective.with_row_ids(loss_fn, layout.params),
        )


@pytest.mark.slow
def test_scores_of_a_run_are_by_the_biases_that_it_was_trained_with(trained):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 19, (1, 13)).astype(np.uint16)
    batch = (jnp.asarray(tokens), jnp.ones((1, 13), jnp.uint8))
    expected, _ = jax.jit(trained.loss)(
        trained.weights, {"router_bias": trained.bias}, batch, None
    )
    logits = score.make_logits(MODEL, policy=trained.policy, layout=trained.layout)

    def nll(weights):
        found = logits(weights, tokens[:, :-1].astype(np.int32))
        likely = jax.nn.log_softmax(jnp.asarray(found), axis=-1)[0]
        return -sum(likely[t, token] for t, token in enumerate(tokens[0, 1:]))

    with_bias = nll(trained.weights | {"router_bias": trained.bias})
    np.testing.assert_allclose(with_bias, expected, atol=12 * FLOAT32_ROUNDING)
    assert abs(nll(trained.weights) - expected) > 100 * FLOAT32_ROUNDING


@pytest.mark.slow
def test_only_training_adds_the_routers_losses(trained):
    tokens = np.random.default_rng(1).integers(0, 19, (2, 9)).astype(np.uint16)
    batch = (jnp.asarray(tokens), jnp.ones((2, 9), jnp.uint8))
    state = {"router_bias": trained.bias}
    run = jax.jit(trained.loss)
    plain, aux = run(trained.weights, state, batch, None)
    total, _ = run(trained.weights, state, batch, jax.random.key(0))
    layers = 3
    extra = layers * (
        0.5 * aux.metrics["router_balance"] + 0.25 * aux.metrics["router_z"]
    )
    np.testing.assert_allclose(total - plain, extra, rtol=1e-4)
    assert extra > 1.0


def test_the_routers_keys_change_what_a_run_computes():
    """None of them may change when a run is resumed."""
    from jaxinfra.config import RESUMABLE

    for key in (
        "train.balance_loss",
        "train.router_bias_rate",
        "model.capacity_factor",
    ):
        assert key in options.leaves(CONFIG)
        assert not any(key == name or key.startswith(f"{name}.") for name in RESUMABLE)
