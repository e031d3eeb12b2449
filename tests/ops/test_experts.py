"""The choice of experts against numpy, and what must not change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.ops import experts, grouped
from jaxinfra.ops.seam import Context
from jaxinfra.precision import policy
from jaxinfra.sharding import Rules

FLOAT32_ROUNDING = 1e-5  # sums of 12 terms about 1
B, T, D, E, k = 3, 7, 12, 8, 3
MIXTRAL = ModelConfig(
    width=D,
    pattern=(LayerConfig(feed_forward="experts"),),
    num_experts=E,
    experts_per_token=k,
)
QWEN = dataclasses.replace(MIXTRAL, router_renormalize=False)
DEEPSEEK = dataclasses.replace(
    MIXTRAL, router="sigmoid", router_scale=2.5, router_groups=4, router_top_groups=2
)
rng = np.random.default_rng(0)
logits_BTE = rng.normal(size=(B, T, E)).astype(np.float32)
bias_E = np.linspace(-0.3, 0.3, E).astype(np.float32)


def one_token(logits_E, cfg, bias_E):
    """{expert: share} by the papers, a loop over experts."""
    if cfg.router == "softmax":
        scores = np.exp(logits_E) / np.exp(logits_E).sum()
    else:
        scores = 1 / (1 + np.exp(-logits_E))
    wanted = scores + bias_E
    allowed = range(E)
    if cfg.router_groups:
        groups = np.arange(E).reshape(cfg.router_groups, -1)
        best = [np.sort(wanted[group])[-2:].sum() for group in groups]
        taken = np.argsort(best)[::-1][: cfg.router_top_groups]
        allowed = groups[taken].reshape(-1)
    chosen = sorted(allowed, key=lambda e: -wanted[e])[: cfg.experts_per_token]
    total = sum(scores[e] for e in chosen) if cfg.router_renormalize else 1.0
    return {e: cfg.router_scale * scores[e] / total for e in chosen}


@pytest.mark.parametrize(
    "cfg", [MIXTRAL, QWEN, DEEPSEEK], ids=["mixtral", "qwen", "v3"]
)
@pytest.mark.parametrize("bias_E", [None, bias_E], ids=["", "biased"])
def test_a_token_meets_the_experts_of_the_papers(cfg, bias_E):
    ids, gates, probs = experts.route(
        jnp.asarray(logits_BTE),
        None if bias_E is None else jnp.asarray(bias_E),
        cfg=cfg,
    )
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=FLOAT32_ROUNDING)
    for b in range(B):
        for t in range(T):
            none = np.zeros(E) if bias_E is None else bias_E
            expected = one_token(np.float64(logits_BTE[b, t]), cfg, none)
            assert ids[b, t].tolist() == list(expected)
            np.testing.assert_allclose(
                gates[b, t], list(expected.values()), atol=FLOAT32_ROUNDING
            )


def test_of_equal_experts_the_lower_numbers_are_taken():
    ids, gates, _ = experts.route(jnp.zeros((1, 1, E)), None, cfg=MIXTRAL)
    assert ids[0, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(gates[0, 0], 1 / 3, atol=FLOAT32_ROUNDING)


def test_a_bias_has_no_gradient_and_moves_against_the_load():
    def of(bias_E):
        return experts.route(jnp.asarray(logits_BTE), bias_E, cfg=DEEPSEEK)[1].sum()

    assert not jax.grad(of)(jnp.asarray(bias_E)).any()
    load_LE = jnp.asarray([[1.0, 5.0, 3.0, 3.0]])
    moved = experts.moved_bias(jnp.zeros((1, 4)), load_LE, rate=0.1)
    np.testing.assert_allclose(moved, [[0.1, -0.1, 0.0, 0.0]], atol=FLOAT32_ROUNDING)


def choose(weights_BT, x_BTD, router_DE, cfg):
    def einsum(equation, x, w, *, out):
        return jnp.einsum(equation, x, w)

    context = Context(None, weights_BT=jnp.asarray(weights_BT))
    return experts.choose(
        {"router": jnp.asarray(router_DE)},
        jnp.asarray(x_BTD),
        context,
        None,
        cfg=cfg,
        einsum=einsum,
        rules=Rules(),
    )


x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
router_DE = rng.normal(size=(D, E)).astype(np.float32)
weights_BT = (rng.random((B, T)) < 0.7).astype(np.float32)


def test_an_expert_takes_tokens_in_order_of_position(one_device):
    cfg = dataclasses.replace(MIXTRAL, capacity_factor=0.75)
    room = experts.capacity(cfg, T)
    assert room == 2  # 7 tokens x 3 / 8 experts x 0.75 = 1.97
    choice, told = choose(weights_BT, x_BTD, router_DE, cfg)
    whole, _ = choose(weights_BT, x_BTD, router_DE, MIXTRAL)
    dropped_BT = np.zeros((B, T))
    for b in range(B):
        taken = np.zeros(E, int)
        for t in range(T):
            for i, e in enumerate(np.asarray(whole.ids_BTk[b, t])):
                assert choice.ranks_BTk[b, t, i] == taken[e]
                has_room = taken[e] < room
                gate = whole.gates_BTk[b, t, i] if has_room else 0.0
                np.testing.assert_allclose(choice.gates_BTk[b, t, i], gate)
                dropped_BT[b, t] += (not has_room) / k
                taken[e] += 1
    assert 0 < dropped_BT.mean() < 1
    expected = (dropped_BT * weights_BT).sum(1)
    np.testing.assert_allclose(told.dropped_B, expected, atol=FLOAT32_ROUNDING)


def test_every_figure_is_a_mean_over_the_targets_of_a_row(one_device):
    _, told = choose(weights_BT, x_BTD, router_DE, MIXTRAL)
    logits = np.float64(x_BTD) @ np.float64(router_DE)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for b in range(B):
        targets = np.flatnonzero(weights_BT[b])
        n = len(targets)
        used = np.zeros(E)
        for t in targets:
            used[np.argsort(-probs[b, t])[:k]] += 1
        share = used / (n * k / E)
        expected = {
            "balance_B": n * (share * probs[b, targets].mean(0)).sum(),
            "z_B": (np.log(np.exp(logits[b, targets]).sum(-1)) ** 2).sum(),
            "entropy_B": -(probs[b, targets] * np.log(probs[b, targets])).sum(),
            "busiest_B": n * share.max(),
            "load_BE": used,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(told, name)[b], value, rtol=1e-5)


@pytest.mark.slow
def test_experts_used_alike_have_a_balance_of_one(one_device):
    x_BTD = np.tile(np.eye(E, dtype=np.float32), (1, 1, 1))
    cfg = dataclasses.replace(MIXTRAL, experts_per_token=1)
    _, told = choose(np.ones((1, E)), x_BTD, 50 * np.eye(E, dtype=np.float32), cfg)
    np.testing.assert_allclose(told.balance_B / E, 1.0, rtol=1e-5)
    np.testing.assert_allclose(told.busiest_B / E, 1.0, rtol=1e-5)


@pytest.mark.parametrize("align", [1, 4])
def test_rows_are_grouped_by_expert_and_come_back(align):
    ids_A = jnp.asarray(rng.integers(0, 4, 20), jnp.int32).at[3].set(4)  # 4: none
    rows = 20 + 4 * (align - 1) + (-20) % align
    rows += -rows % align
    found = jax.tree.map(
        np.asarray, grouped.arrange(ids_A, num_experts=3, rows=rows, align=align)
    )
    assert (found.sizes_E % align == 0).all()
    starts = np.cumsum(found.sizes_E) - found.sizes_E
    for e in range(3):
        mine = np.flatnonzero(np.asarray(ids_A) == e)
        places = starts[e] + np.arange(len(mine))
        np.testing.assert_array_equal(found.source_R[places], mine)
        np.testing.assert_array_equal(found.place_A[mine], places)
    assert (found.place_A[np.asarray(ids_A) >= 3] == rows).all()
    assert (
        np.sort(found.source_R)[-(rows - (np.asarray(ids_A) < 3).sum()) :] == 20
    ).all()


@pytest.mark.parametrize("has_ragged", [True, False])
def test_a_grouped_matmul_is_one_of_each_row_with_its_expert(
    has_ragged, one_device, monkeypatch
):
    monkeypatch.setattr(grouped, "_has_ragged", lambda: has_ragged)
    align = 1 if has_ragged else 4
    sizes_E = jnp.asarray([8, 0, 4], jnp.int32)
    x_RI = jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)
    w_EIO = jnp.asarray(rng.normal(size=(3, 5, 6)), jnp.float32)
    g_RO = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32).at[12:].set(0)

    def local(x_RI, w_EIO, sizes_E, g_RO):
        run = lambda x, w: grouped.grouped(
            x, w, sizes_E, jax.P(None, None, None), align, policy("float32")
        )
        y, back = jax.vjp(run, x_RI, w_EIO)
        return y, *back(g_RO)

    whole = jax.P()
    y, dx, dw = jax.jit(
        jax.shard_map(local, in_specs=(whole,) * 4, out_specs=(whole,) * 3)
    )(x_RI, w_EIO, sizes_E, g_RO)
    expert = np.repeat([0, 1, 2], [8, 0, 4])
    x, w, g = (np.float64(a) for a in (x_RI[:12], w_EIO, g_RO[:12]))
    np.testing.assert_allclose(
        y[:12], np.einsum("ri,rio->ro", x, w[expert]), atol=FLOAT32_ROUNDING
    )
    np.testing.assert_allclose(
        dx[:12], np.einsum("ro,rio->ri", g, w[expert]), atol=FLOAT32_ROUNDING
    )
    outer = np.einsum("ri,ro->rio", x, g)
    expected = np.stack([outer[expert == e].sum(0) for e in range(3)])
    np.testing.assert_allclose(dw, expected, atol=FLOAT32_ROUNDING)
