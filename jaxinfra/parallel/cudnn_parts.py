"""cuDNN's attention to a part of the keys, and its gradient given that of the whole.

jax has no function for either: its own gives the log-sum-exp in the narrow type of the
result, and its pull-back reads the result and the log-sum-exp of its own forward pass.
So both are cut from what jax traces: the equations up to the forward kernel, whose
second result is the log-sum-exp in float32, and those after it, which are given the
results of the whole in place of that kernel's.
"""

import functools

import jax
from jax.extend import core

from jaxinfra.ops.rematerialisation import CUDNN
from jaxinfra.parallel import phases


def forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    is_seen_B1TS: jax.Array | None,
    *,
    is_causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, its log-sum-exp float32 [B, N, T]). A query that sees no key has one
    below -1e4, and any result."""
    given = [q_BTNH, k_BSKH, v_BSKH, is_seen_B1TS]
    closed, kernel = _traced(*given, q_BTNH, is_causal)
    *inputs, _ = closed.jaxpr.invars
    run = phases.part(closed, inputs, kernel.outvars)
    out_BTNH, log_sum_BNT = run(*jax.tree.leaves(given))
    return out_BTNH, log_sum_BNT


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    is_seen_B1TS: jax.Array | None,
    out_BTNH: jax.Array,
    log_sum_BNT: jax.Array,
    g_BTNH: jax.Array,
    *,
    is_causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq_BTNH, dk_BSKH, dv_BSKH) by these keys, of the gradient `g` by the whole
    result `out`, whose log-sum-exp over all keys is given."""
    given = [q_BTNH, k_BSKH, v_BSKH, is_seen_B1TS, g_BTNH]
    closed, kernel = _traced(*given, is_causal)
    inputs = [*closed.jaxpr.invars, *kernel.outvars]
    run = phases.part(closed, inputs, closed.jaxpr.outvars)
    dq_BTNH, dk_BSKH, dv_BSKH = run(*jax.tree.leaves(given), out_BTNH, log_sum_BNT)
    return dq_BTNH, dk_BSKH, dv_BSKH


def _traced(
    q_BTNH, k_BSKH, v_BSKH, is_seen_B1TS, g_BTNH, is_causal
) -> tuple[core.ClosedJaxpr, core.JaxprEqn]:
    """(the equations of the pull-back, flat; that of the forward kernel)."""

    def pull_back(q_BTNH, k_BSKH, v_BSKH, is_seen_B1TS, g_BTNH):
        attend = functools.partial(
            jax.nn.dot_product_attention,
            mask=is_seen_B1TS,
            is_causal=is_causal,
            implementation="cudnn",
        )
        return jax.vjp(attend, q_BTNH, k_BSKH, v_BSKH)[1](g_BTNH)

    traced = jax.make_jaxpr(pull_back)(q_BTNH, k_BSKH, v_BSKH, is_seen_B1TS, g_BTNH)
    closed = core.ClosedJaxpr(phases.inlined(traced.jaxpr), traced.consts)
    [kernel] = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == CUDNN]
    return closed, kernel
