"""The bfloat16 policy: float32 where it must be, and a loss near float32's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import tiny_runs

from jaxinfra import experiment, mesh, precision, sharding
from jaxinfra.ops import seam
from jaxinfra.sharding import Rules

# 8 bits of mantissa, through two layers and 20 updates: of a loss of 3 to 6 nats.
BF16_LOSS = 3e-2


def test_the_state_is_float32_and_so_is_every_moment(tmp_path):
    data = tiny_runs.write_documents(tmp_path / "set")
    built = tiny_runs.build(tiny_runs.tiny(precision="bfloat16"), data)
    state = experiment.abstract_state(built)
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


@pytest.mark.slow
def test_twenty_steps_stay_near_those_of_float32(tmp_path):
    data = tiny_runs.write_documents(tmp_path / "set")
    exact = tiny_runs.run(tiny_runs.tiny(), data)
    found = tiny_runs.run(tiny_runs.tiny(precision="bfloat16"), data)
    np.testing.assert_allclose(found["loss"], exact["loss"], rtol=0, atol=BF16_LOSS)
    assert not np.array_equal(found["loss"], exact["loss"]), "it must be bfloat16"
    np.testing.assert_array_equal(found["digest"], exact["digest"])
