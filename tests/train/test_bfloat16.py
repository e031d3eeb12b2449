"""The bfloat16 policies: float32 where it must be, and a loss near float32's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import tiny_runs

from jaxinfra import mesh, precision, sharding
from jaxinfra.config import MeshConfig
from jaxinfra.ops import seam
from jaxinfra.sharding import Rules

# 8 bits of mantissa, through two layers and 20 updates: of a loss of 3 to 6 nats.
BF16_LOSS = 3e-2
SAME_LOSS = 1e-2  # of the loss, that stochastic rounding may cost


def small(
    precision="bfloat16_params",
    optimizer="adamw",
    *,
    steps=4,
    rounding="stochastic",
    **settings,
):
    made = tiny_runs.tiny(precision=precision, optimizer=optimizer)
    return dataclasses.replace(
        made,
        model=dataclasses.replace(made.model, width=32, ffn_width=48),
        train=dataclasses.replace(
            made.train, steps=steps, batch_size=8, rounding=rounding
        ),
        optimizer=dataclasses.replace(made.optimizer, warmup_steps=2, **settings),
    )


def test_the_state_is_float32_and_so_is_every_moment(tmp_path):
    data = tiny_runs.write_documents(tmp_path / "set")
    built = tiny_runs.build(tiny_runs.tiny(precision="bfloat16"), data)
    state = built.abstract()
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert built.policy.compute == jnp.bfloat16
    assert built.policy.reduce == jnp.float32


def test_a_weight_gradient_is_not_rounded_before_it_is_summed_over_devices():
    """A device's part keeps its float32 digits: bfloat16 would drop the small one."""
    policy, rules = precision.policy("bfloat16"), Rules()
    here = mesh.make_mesh({"fsdp": 2}, devices=jax.devices()[:2])
    rows = jax.NamedSharding(here, jax.P("fsdp", None, None))
    x_BTD = jax.device_put(jnp.ones((2, 1, 4), jnp.bfloat16), rows)
    w_DF = jax.device_put(
        jnp.ones((4, 6)), jax.NamedSharding(here, jax.P("fsdp", None))
    )
    # Parts of 1 and 2**-10: their sum needs 11 bits.
    g = np.ones((2, 1, 6), np.float32)
    g[1] = 2.0**-10
    places = jax.NamedSharding(here, sharding.spec(rules, "batch", "length", "ffn"))
    g_BTF = jax.device_put(jnp.asarray(g, jnp.bfloat16), places)
    einsum = seam.make_einsum(policy, rules)

    def weighted(w_DF):
        y_BTF = einsum("BTD,DF->BTF", x_BTD, w_DF, out=("batch", "length", "ffn"))
        assert y_BTF.dtype == jnp.bfloat16
        return jnp.sum((y_BTF * g_BTF).astype(jnp.float32))

    with jax.set_mesh(here):
        found = jax.jit(jax.grad(weighted))(w_DF)
    assert found.dtype == jnp.float32
    assert found.sharding.spec == w_DF.sharding.spec
    np.testing.assert_array_equal(found, np.full((4, 6), 1 + 2.0**-10, np.float32))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "adafactor", "sgd"])
def test_parameters_are_bfloat16_and_moments_and_average_float32(tmp_path, optimizer):
    data = tiny_runs.write_documents(tmp_path / "set")
    built = tiny_runs.build(small(optimizer=optimizer, ema_decay=0.9), data)
    state = built.abstract()
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
    for leaf in jax.tree.leaves(state.opt_state):
        assert leaf.dtype in (jnp.float32, jnp.int32)


def test_first_parameters_are_those_of_float32_rounded(tmp_path):
    data = tiny_runs.write_documents(tmp_path / "set")
    exact = tiny_runs.first_params(small("float32"), data)
    found = tiny_runs.first_params(small(), data)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x.astype(jnp.bfloat16), y),
        exact,
        found,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "zero"), [("adamw", 0), ("muon", 1), ("lion", 2), ("adafactor", 3)]
)
def test_bfloat16_parameters_train_on_a_mesh_for_every_zero(tmp_path, optimizer, zero):
    data = tiny_runs.write_documents(tmp_path / "set")
    config = small(optimizer=optimizer, learning_rate=1e-3)
    expected = tiny_runs.run(config, data)["loss"]
    four = MeshConfig(data=1, fsdp=2, tensor=2)
    found = tiny_runs.run(dataclasses.replace(config, mesh=four, zero=zero), data)
    np.testing.assert_allclose(found["loss"], expected, rtol=0, atol=BF16_LOSS)


@pytest.mark.slow
def test_stochastic_rounding_learns_as_float32_masters_do_and_nearest_does_not(
    tmp_path,
):
    """At a rate at which most updates are below half a unit in the last place."""
    data = tiny_runs.write_documents(tmp_path / "set")
    settings = {"steps": 250, "learning_rate": 3e-4, "schedule": "constant"}

    def last_losses(precision, rounding="stochastic"):
        config = small(precision, rounding=rounding, **settings)
        return tiny_runs.run(config, data)["loss"][-50:].mean()

    masters = last_losses("bfloat16")
    stochastic = last_losses("bfloat16_params")
    nearest = last_losses("bfloat16_params", "nearest")
    assert abs(stochastic - masters) < SAME_LOSS * masters
    assert nearest > masters + 10 * SAME_LOSS * masters


@pytest.mark.slow
def test_twenty_steps_stay_near_those_of_float32(tmp_path):
    data = tiny_runs.write_documents(tmp_path / "set")
    exact = tiny_runs.run(tiny_runs.tiny(), data)
    found = tiny_runs.run(tiny_runs.tiny(precision="bfloat16"), data)
    np.testing.assert_allclose(found["loss"], exact["loss"], rtol=0, atol=BF16_LOSS)
    assert not np.array_equal(found["loss"], exact["loss"]), "it must be bfloat16"
    np.testing.assert_array_equal(found["digest"], exact["digest"])
