"""The count of matmul FLOPs in a compiled program, on one whose FLOPs are known."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

PATH = pathlib.Path(__file__).parents[2] / "scripts/peers/program_flops.py"
M, K, N, TURNS, INNER = 24, 16, 40, 7, 3


def load():
    spec = importlib.util.spec_from_file_location("program_flops", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loops_are_multiplied_out_and_branches_weighted():
    def turn(x_MK, t):
        def work(x_MK):
            def layer(x_MK, _):
                return jnp.tanh(x_MK @ w_KN) @ v_NK, None

            return jax.lax.scan(layer, x_MK, None, length=INNER)[0]

        with jax.named_scope("forward"):
            return jax.lax.cond(t % 2 == 0, work, jnp.sin, x_MK), None

    w_KN, v_NK = jnp.ones((K, N)), jnp.ones((N, K))
    loop = jax.jit(lambda x_MK: jax.lax.scan(turn, x_MK, jnp.arange(TURNS))[0])
    text = loop.lower(jnp.ones((M, K))).compile().as_text()
    one = 2 * 2 * M * K * N * INNER
    flops = load().matmul_flops
    assert flops(text, {}) == pytest.approx(TURNS * one)
    assert flops(text, {"forward": 4 / TURNS}) == pytest.approx(4 * one)
