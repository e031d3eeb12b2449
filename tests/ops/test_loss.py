"""Chunked cross-entropy against optax on whole logits: sums and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfra import precision, sharding
from jaxinfra.ops import layers, loss

FLOAT32_ROUNDING = 1e-5  # sums of 20 losses of size 3, chunk by chunk
FLOAT16_ROUNDING = 1e-2  # 11-bit probabilities and results, in sums of 20 terms
# Optimising these programs takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0}
B, T, D, V, PADDED = 4, 5, 6, 23, 24

rng = np.random.default_rng(0)
h_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
# The padding row is not zero, so that it would show.
head_VD = rng.normal(size=(PADDED, D)).astype(np.float32)
targets_BT = rng.integers(0, V, (B, T)).astype(np.uint16)
targets_BT[0, :2] = (0, V - 1)
weights_BT = rng.integers(0, 3, (B, T)).astype(np.float32)


def expected_sums(h_BTD, head_VD, *, softcap, label_smoothing=0.0):
    """(nll, z) sums from the whole logits."""
    logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, head_VD[:V], precision="highest")
    if softcap:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    labels_BTV = optax.smooth_labels(jax.nn.one_hot(targets_BT, V), label_smoothing)
    ce_BT = optax.softmax_cross_entropy(logits_BTV, labels_BTV)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return jnp.sum(ce_BT * weights_BT), jnp.sum(log_z_BT**2 * weights_BT)


def make_config(*, policy="float32", zero=3, **settings):
    rules = sharding.make_layout(jax.sharding.get_mesh(), zero=zero).params
    policy = precision.policy(policy)
    return loss.LossConfig(vocab_size=V, policy=policy, rules=rules, **settings)


def place(cfg):
    names = {
        "h": ("batch", "length", "width"),
        "head": ("vocab", "embed"),
        "targets": ("batch", "length"),
        "weights": ("batch", "length"),
    }
    arrays = (h_BTD.astype(cfg.policy.compute), head_VD, targets_BT, weights_BT)
    return [
        jax.device_put(array, sharding.spec(cfg.rules, *dims))
        for array, dims in zip(arrays, names.values(), strict=True)
    ]


SETTINGS = {
    "one chunk": {},
    "chunks that do not divide": {"chunk": 3},
    "softcap": {"softcap": 1.5},
    "z loss": {"z_loss": 0.1},
    "label smoothing": {"label_smoothing": 0.2},
    "all": {"chunk": 3, "softcap": 1.5, "z_loss": 0.1, "label_smoothing": 0.2},
    "zero 1": {"chunk": 3, "zero": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_sums_and_gradients_are_those_of_whole_logits(name, each_mesh):
    check_sums_and_gradients(make_config(**SETTINGS[name]))


@pytest.mark.parametrize("name", ["all", "one chunk"])
def test_they_are_where_the_tokens_travel_and_not_the_head(
    name, four_devices, monkeypatch
):
    """The head cut by vocabulary over fsdp too, as a larger one is by itself."""
    asked = []
    monkeypatch.setattr(loss, "_do_tokens_travel", lambda *_: not asked.append(1))
    check_sums_and_gradients(make_config(**SETTINGS[name]))
    assert asked


def test_tokens_travel_where_that_is_less_on_the_wire(four_devices):
    cfg = make_config()
    spec = functools.partial(sharding.spec, cfg.rules)

    def travels(tokens, vocab):
        h = jax.device_put(
            np.zeros((2, tokens, D), np.float32), spec("batch", "length", "width")
        )
        head = jax.device_put(np.zeros((vocab, D), np.float32), spec("vocab", "embed"))
        return loss._do_tokens_travel(h, head, cfg)

    assert travels(tokens=4, vocab=64)
    assert not travels(tokens=64, vocab=64)
    assert not travels(tokens=4, vocab=66), "33 rows do not divide over fsdp 2"


def check_sums_and_gradients(cfg):
    h, head, targets, weights = place(cfg)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(h, head):
        def total(h, head):
            sums = loss.cross_entropy(h, head, targets, weights, cfg)
            return 0.5 * sums.nll, sums

        return jax.grad(total, argnums=(0, 1), has_aux=True)(h, head)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def expect(h, head):
        def total(h, head):
            nll, z = expected_sums(
                h, head, softcap=cfg.softcap, label_smoothing=cfg.label_smoothing
            )
            return 0.5 * (nll + cfg.z_loss * z), (nll, z)

        return jax.grad(total, argnums=(0, 1), has_aux=True)(h, head)

    (dh, dhead), sums = run(h, head)
    (expected_dh, expected_dhead), expected = expect(h_BTD, head_VD)
    assert jax.typeof(dh).sharding.spec == jax.typeof(h).sharding.spec
    assert jax.typeof(dhead).sharding.spec == jax.typeof(head).sharding.spec
    np.testing.assert_allclose(sums, expected, rtol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(dh, expected_dh, atol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(dhead, expected_dhead, atol=FLOAT32_ROUNDING)
    assert not np.asarray(dhead)[V:].any()  # padding gets no gradient


def test_without_a_gradient_the_sums_are_the_same(each_mesh):
    cfg = make_config(chunk=3, softcap=1.5)
    sums = jax.jit(lambda *arrays: loss.cross_entropy(*arrays, cfg))(*place(cfg))
    expected = expected_sums(jnp.asarray(h_BTD), jnp.asarray(head_VD), softcap=1.5)
    np.testing.assert_allclose(sums, np.asarray(expected), rtol=FLOAT32_ROUNDING)


def test_a_tied_table_gets_both_gradients(four_devices):
    cfg = make_config()
    _, head, targets, weights = place(cfg)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(head):
        def total(head):
            h = layers.embed(head, targets, policy=cfg.policy, rules=cfg.rules)
            return loss.cross_entropy(h, head, targets, weights, cfg).nll

        return jax.grad(total)(head)

    expected = jax.grad(
        lambda head: expected_sums(head[targets_BT], head, softcap=0.0)[0]
    )(jnp.asarray(head_VD))
    np.testing.assert_allclose(run(head), expected, atol=FLOAT32_ROUNDING)


def test_under_bfloat16_the_head_gradient_is_float32(four_devices):
    cfg = make_config(policy="bfloat16", chunk=3)
    h, head, targets, weights = place(cfg)
    run = jax.jit(
        jax.grad(
            lambda h, head: loss.cross_entropy(h, head, targets, weights, cfg).nll,
            argnums=(0, 1),
        )
    )
    dh, dhead = run(h, head)
    assert (dh.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)
    expected = jax.grad(lambda x: expected_sums(h_BTD, x, softcap=0.0)[0])(head_VD)
    # 8-bit h, head and probabilities in sums of 20 terms of size 1.
    np.testing.assert_allclose(dhead, expected, atol=5e-2)


@pytest.mark.parametrize("factor", [2.0**-4, 1.0, 2.0**10])
def test_under_float16_a_gradient_is_rounded_once_it_is_scaled(factor, four_devices):
    """The head's gradient of a rare token, below float16's smallest number, is right
    too."""
    cfg = make_config(policy="float16", chunk=3)
    # Numbers that float16 has; the last true id is unlikely everywhere, never a target.
    is_rare = np.arange(PADDED)[:, None] == V - 1
    head = np.where(is_rare, -6.0, np.maximum(head_VD, 0)).astype(np.float16)
    h = np.abs(h_BTD).astype(np.float16)
    ids = np.minimum(targets_BT, V - 2)
    _, _, _, weights = place(cfg)
    spec = functools.partial(sharding.spec, cfg.rules)
    placed = [
        jax.device_put(h, spec("batch", "length", "width")),
        jax.device_put(head.astype(np.float32), spec("vocab", "embed")),
    ]
    targets = jax.device_put(ids, spec("batch", "length"))

    @jax.jit
    def run(h, head):
        def total(h, head):
            return factor * loss.cross_entropy(h, head, targets, weights, cfg).nll

        return jax.grad(total, argnums=(0, 1))(h, head)

    def exact(h, head):
        labels = jax.nn.one_hot(ids, V)
        ce_BT = optax.softmax_cross_entropy(h @ head[:V].T, labels)
        return jnp.sum(ce_BT * weights_BT)

    dh, dhead = run(*placed)
    assert (dh.dtype, dhead.dtype) == (jnp.float16, jnp.float32)
    dhead = np.asarray(dhead) / factor
    arrays = (h.astype(np.float32), head.astype(np.float32))
    expected_dh, expected_dhead = jax.grad(exact, argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(
        dh.astype(np.float32) / factor, expected_dh, atol=FLOAT16_ROUNDING
    )
    np.testing.assert_allclose(dhead, expected_dhead, atol=FLOAT16_ROUNDING)
    assert 1e-9 < np.abs(expected_dhead[V - 1]).max() < 1e-6
    np.testing.assert_allclose(dhead[V - 1], expected_dhead[V - 1], rtol=5e-2)


def test_the_program_never_holds_the_logits_of_the_whole_batch(one_device):
    B, T, D, V = 4, 64, 8, 512
    policy, rules = precision.policy("float32"), sharding.Rules()

    def compiled(total):
        shapes = {
            "h": ((B, T, D), ("batch", "length", "width")),
            "head": ((V, D), ("vocab", "embed")),
            "targets": ((B, T), ("batch", "length")),
            "weights": ((B, T), ("batch", "length")),
        }
        arrays = [
            jax.ShapeDtypeStruct(
                shape,
                jnp.int32 if name == "targets" else jnp.float32,
                sharding=jax.NamedSharding(one_device, sharding.spec(rules, *names)),
            )
            for name, (shape, names) in shapes.items()
        ]
        return jax.jit(jax.grad(total, argnums=(0, 1))).lower(*arrays).compile()

    def chunked(h, head, targets, weights):
        cfg = loss.LossConfig(vocab_size=V, policy=policy, rules=rules, chunk=16)
        return loss.cross_entropy(h, head, targets, weights, cfg).nll

    def naive(h, head, targets, weights):
        logits = jnp.einsum("BTD,VD->BTV", h, head, out_sharding=jax.P())
        one_hot = targets[..., None] == jnp.arange(V)
        ce = optax.softmax_cross_entropy(logits, one_hot)
        return jnp.sum(ce * weights)

    whole_bytes = 4 * B * T * V
    shapes = (f"[{B * T},{V}]", f"[{B},{T},{V}]")
    small, large = compiled(chunked), compiled(naive)
    assert small.memory_analysis().temp_size_in_bytes < whole_bytes / 4
    assert not any(shape in small.as_text() for shape in shapes)
    assert large.memory_analysis().temp_size_in_bytes >= whole_bytes
    assert any(shape in large.as_text() for shape in shapes)


@pytest.mark.parametrize(
    ("tokens", "vocab", "chunk", "expected"),
    [
        (20, 8, 3, (7, 3)),
        (20, 8, 0, (1, 20)),
        (1024, 1 << 20, 0, (4, 256)),  # never below 256 tokens
        (5000, 16 << 10, 0, (20, 250)),
    ],
)
def test_chunks_are_equal_and_cover_all_tokens(
    tokens, vocab, chunk, expected, one_device
):
    num_chunks, size = loss._chunks(tokens, vocab, chunk)
    assert (num_chunks, size) == expected
    assert num_chunks * size >= tokens
