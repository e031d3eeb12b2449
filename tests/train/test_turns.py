"""The update of a state on the host, parameter by parameter: the same numbers, and
never more of the state on the device than it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from jaxinfra import mesh, params, sharding
from jaxinfra.config import AXES, OptimizerConfig
from jaxinfra.parallel import phases
from jaxinfra.params import ParamSpec
from jaxinfra.train import objective, offload, optim, turns
from jaxinfra.train import state as states
from jaxinfra.train import step as steps

START = params.normal(1.0)
SPECS = {
    "embedding": ParamSpec((24, 16), ("vocab", "embed"), (1,), "embedding", START),
    "stack": ParamSpec(
        (3, 16, 32), ("layers", "embed", "ffn"), (1,), "matrix", START
    ),
    "matrix": ParamSpec((32, 16), ("ffn", "embed"), (0,), "matrix", START),
    "scale": ParamSpec((16,), ("embed",), (), "vector", START),
}  # fmt: skip
OPTIMIZERS = {
    "adamw": {},
    "adamw, 8 bits": {"moments": "8bit"},
    "adamw, averaged": {"ema_decay": 0.9},
    "lion": {"name": "lion"},
    "sgd": {"name": "sgd"},
    "adafactor, averaged": {"name": "adafactor", "ema_decay": 0.9},
    "muon": {"name": "muon"},
    "muon, averaged": {"name": "muon", "ema_decay": 0.9},
}  # fmt: skip

# The others are slow: each takes some seconds to compile.
QUICK = {("adamw", 1), ("adamw, 8 bits", 3), ("muon, averaged", 0)}


def made(optimizer, *, devices, zero, is_on_host, dtype=jnp.float32):
    """(train_step, first state, mesh) of a loss whose gradients are a formula."""
    sizes = dict.fromkeys(AXES, 1) | {"fsdp": devices}
    grid = mesh.make_mesh(sizes, devices=jax.devices()[:devices])
    layout = sharding.make_layout(grid, zero=zero)
    cfg = dataclasses.replace(OptimizerConfig(), **OPTIMIZERS[optimizer])
    tx = optim.make_optimizer(cfg, SPECS, optim.make_schedule(cfg, 10))
    places = states.make_shardings(SPECS, tx, layout)
    more = {}
    if is_on_host:
        places, more = offload.state_on_host(places), {"ordered": turns.in_turn}

    def grad_fn(params, model_state, batch, key):
        grads = jax.tree.map(lambda p: jnp.sin(7 * p.astype(jnp.float32)), params)
        grads = jax.tree.map(jax.reshard, grads, places.grads)
        aux = objective.Aux(jnp.float32(2), {}, {})
        return jax.tree.map(lambda g: g * batch, grads), batch, aux

    train_step = steps.make_train_step(grad_fn, tx, shardings=places, **more)
    first = functools.partial(
        states.init_state, SPECS, tx, places, layout, dtype=dtype, seed=0
    )
    return jax.jit(train_step, donate_argnums=0), first, grid


def four_steps(optimizer, **how):
    """The state after four steps, of which the third has no finite loss."""
    train_step, first, grid = made(optimizer, **how)
    with jax.set_mesh(grid):
        state = first()
        for batch in (1.0, 0.5, np.nan, 2.0):
            state, metrics = train_step(state, jnp.float32(batch))
            assert bool(metrics["is_finite"]) == np.isfinite(batch)
    return state


@pytest.mark.parametrize(
    ("optimizer", "devices", "zero"),
    [
        pytest.param(
            name, devices, zero, marks=[] if (name, zero) in QUICK else pytest.mark.slow
        )
        for name in OPTIMIZERS
        for devices, zero in ((1, 3), (8, 0), (8, 1), (8, 3))
    ],
)
def test_the_state_is_bitwise_that_of_an_update_at_once(optimizer, devices, zero):
    where = {"devices": devices, "zero": zero}
    found = four_steps(optimizer, is_on_host=True, **where)
    expected = four_steps(optimizer, is_on_host=False, **where)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(found.opt_state)}
    assert kinds == {mesh.HOST}
    for (path, one), (_, other) in zip(params.named(found), params.named(expected)):
        assert one.sharding.is_equivalent_to(
            other.sharding.with_memory_kind(one.sharding.memory_kind), one.ndim
        ), path
        np.testing.assert_array_equal(one, other, err_msg=path)


def program(optimizer):
    """The equations of a step, and for each variable all that it is made of."""
    train_step, first, grid = made(optimizer, devices=1, zero=3, is_on_host=True)
    with jax.set_mesh(grid):
        closed = jax.make_jaxpr(train_step)(first(), jnp.float32(1))
    jaxpr = phases.inlined(closed.jaxpr)
    made_of = {var: {var} for var in (*jaxpr.invars, *jaxpr.constvars)}
    for eqn in jaxpr.eqns:
        read = [atom for atom in eqn.invars if not isinstance(atom, core.Literal)]
        found = set().union(*(made_of[var] for var in read))
        made_of.update({var: {var} | found for var in eqn.outvars})
    return jaxpr, made_of


def moved(jaxpr, space):
    return [
        eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "device_put" and set(eqn.params["devices"]) == {space}
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fetch_waits_for_what_was_sent_two_turns_before(optimizer):
    jaxpr, made_of = program(optimizer)
    fetched = moved(jaxpr, jax.memory.Space.Device)
    sent = moved(jaxpr, jax.memory.Space.Host)
    # One for each parameter, its average and what is not read, as lion's count.
    assert len(fetched) == len(sent) >= len(SPECS)
    for eqns in (fetched, sent):
        arrays = [var for eqn in eqns for var in eqn.invars]
        assert len(arrays) == len(set(arrays)), "each goes once"
    batch = jaxpr.invars[-1]
    for eqn in fetched:
        needs = [made_of[var] for var in eqn.invars]
        assert all(batch in need for need in needs), "it waits for the gradients"
    for earlier, eqn in zip(sent, fetched[2:]):
        for var in eqn.invars:
            assert made_of[var] >= set(earlier.outvars)
    # The turn before is not waited for: it leaves meanwhile.
    for last, eqn in zip(sent[1:], fetched[2:]):
        for var in eqn.invars:
            assert not made_of[var] & set(last.outvars)


def test_the_largest_come_first():
    jaxpr, _ = program("adamw")
    sizes = [
        max(var.aval.size for var in eqn.outvars)
        for eqn in moved(jaxpr, jax.memory.Space.Device)
    ]
    assert sizes == sorted(sizes, reverse=True)
