"""Attention over rows whose length is split, against attention over whole rows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import kernels_anywhere, naive_attention

from jaxinfra import mesh as mesh_lib
from jaxinfra.ops import attention
from jaxinfra.ops.seam import Context
from jaxinfra.parallel import context, meeting
from jaxinfra.sharding import Rules

BFLOAT16_ROUNDING = 1e-2  # of inputs, weights, and each part of a result
FLOAT32_ROUNDING = 1e-5  # sums over 48 keys in another order, of results about 1
MESH = {"data": 2, "context": 4}
B, T, K, G, H = 2, 48, 2, 2, 8
CASES = {
    "segments": {"window": 0, "softcap": 0.0, "with_segments": True},
    "one document": {"window": 0, "softcap": 0.0, "with_segments": False},
    "window of 9": {"window": 9, "softcap": 0.0, "with_segments": True},
    "window of 30, capped": {"window": 30, "softcap": 1.5, "with_segments": False},
}
QUICK = [("ring", "segments"), ("ulysses", "window of 9"), ("all_gather", "segments")]
MORE = [
    (way, case)
    for way in ("ring", "ulysses", "all_gather")
    for case in CASES
    if (way, case) not in QUICK
]


@functools.cache
def inputs(length=T):
    return naive_attention.random_inputs(B=B, T=length, K=K, G=G, H=H)


def split_attention(way, sizes, given, kernel=None, *, window, softcap, with_segments):
    """(result, dq, dk, dv) on the mesh, back in the order of the rows."""
    *arrays, g_BTKGH, segments_BT = given
    length, parts = segments_BT.shape[1], sizes["context"]
    order_T = context.row_order(length, parts=parts, way=way)
    order_T = np.arange(length) if order_T is None else order_T
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(mesh_lib.make_mesh(sizes, devices=devices)):
        attend = context.make_split_attend(Rules(), way=way, kernel=kernel)

        def run(q, k, v, segments_BT):
            about = Context(None, segments_BT if with_segments else None)
            out, _ = attend(q, k, v, about, None, window=window, softcap=softcap)
            return out

        def both(q, k, v, g, segments_BT):
            out, back = jax.vjp(lambda *x: run(*x, segments_BT), q, k, v)
            return out, *back(g)

        place = jax.P(("data", "fsdp", "expert"), "context")
        given = [x[:, order_T] for x in (*arrays, g_BTKGH, segments_BT)]
        heads = jax.P(*place, "tensor")
        found = jax.jit(both)(
            *(jax.device_put(x, heads) for x in given[:4]),
            jax.device_put(given[4], place),
        )
    return [np.asarray(x)[:, np.argsort(order_T)] for x in found]


def check(way, case, sizes=MESH):
    found = split_attention(way, sizes, inputs(), **CASES[case])
    *arrays, segments_BT = inputs()
    settings = dict(CASES[case])
    segments_BT = segments_BT if settings.pop("with_segments") else None
    expected = naive_attention.forward_backward(*arrays, segments_BT, **settings)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize(
    ("way", "case"),
    [*QUICK, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in MORE)],
)
def test_rows_that_are_split_attend_as_whole_ones(way, case):
    check(way, case)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ring", "ulysses", "all_gather"])
@pytest.mark.parametrize(
    "sizes", [{"context": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "expert": 1}]
)
def test_heads_and_length_are_split_together(way, sizes):
    check(way, "segments", sizes)


@pytest.mark.parametrize(
    ("way", "kernel", "length", "window", "softcap", "with_segments"),
    [
        ("ring", "cudnn", 512, 0, 0.0, True),
        ("ring", "cudnn", 512, 0, 0.0, False),
        ("all_gather", "cudnn", 512, 0, 0.0, True),
        ("all_gather", "cudnn", 512, 0, 0.0, False),
        ("ring", "splash", 512, 0, 0.0, True),
        ("ring", "splash", 512, 0, 0.0, False),
        ("all_gather", "splash", 512, 0, 0.0, True),
        ("all_gather", "splash", 1024, 0, 1.5, False),
        # Within a block of 128, over its edge by one token, over a whole one.
        ("all_gather", "splash", 1024, 100, 0.0, False),
        ("ring", "splash", 1024, 100, 0.0, True),
        ("all_gather", "splash", 1024, 130, 0.0, True),
        ("ring", "splash", 1024, 130, 1.5, False),
        ("all_gather", "splash", 1024, 257, 0.0, False),
        ("ring", "splash", 1024, 257, 0.0, True),
        ("ring", "splash", 1536, 300, 0.0, True),
        ("all_gather", "splash", 1536, 0, 0.0, True),
    ],
)
def test_parts_of_a_fused_kernel_are_attention_over_whole_rows(
    way, kernel, length, window, softcap, with_segments, monkeypatch, caplog
):
    kernels_anywhere.allow(monkeypatch)
    attention.say_once.cache_clear()
    *arrays, segments_BT = inputs(length)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    settings = {"window": window, "softcap": softcap}
    found = split_attention(
        way,
        {"context": {512: 2, 1024: 4, 1536: 2}[length]},
        (*narrow, segments_BT),
        kernel,
        with_segments=with_segments,
        **settings,
    )
    assert "xla is used instead" not in caplog.text
    segments_BT = segments_BT if with_segments else None
    wide = [np.asarray(x, np.float32) for x in narrow]
    expected = naive_attention.forward_backward(*wide, segments_BT, **settings)
    for got, want in zip(found, expected, strict=True):
        far = np.linalg.norm(got.astype(np.float32) - want) / np.linalg.norm(want)
        assert far < BFLOAT16_ROUNDING


@pytest.mark.parametrize(
    ("way", "kernel", "window", "reason"),
    [
        ("ring", "splash", 9, None),
        ("ring", "cudnn", 9, "a window in a ring"),
        ("all_gather", "cudnn", 9, "a window over gathered keys"),
        ("all_gather", "splash", 9, None),
        ("all_gather", "cudnn", 0, None),
        ("ulysses", "cudnn", 9, None),
        ("ring", "splash", 0, None),
    ],
)
def test_where_no_kernel_serves_has_a_reason(way, kernel, window, reason):
    assert context._refused(way, window).get(kernel) == reason


@pytest.mark.parametrize("way", ["ring", "all_gather"])
@pytest.mark.parametrize("kernel", ["cudnn", "splash", "xla"])
@pytest.mark.parametrize("window", [0, 100])
def test_remat_keeps_a_whole_result_and_no_parts(way, kernel, window, monkeypatch):
    """By name: the result of attention and its log-sum-exp, beside what goes in."""
    kernels_anywhere.allow(monkeypatch)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(512)[:3]]
    place = jax.P(("data", "fsdp", "expert"), "context", "tensor")
    with jax.set_mesh(mesh_lib.make_mesh({"context": 2}, devices=jax.devices()[:2])):
        attend = context.make_split_attend(Rules(), way=way, kernel=kernel)

        def kept(remat):
            saving = kernels_anywhere.saving(attend, remat, window=window)
            result, sizes = kernels_anywhere.sizes_kept(saving, arrays, block=128)
            return [size for size in sizes if size > 1000], result  # no tables

        arrays = [jax.device_put(x, place) for x in arrays]
        given = sorted(x.size for x in arrays)
        assert kept("full")[0] == given
        sizes, result = kept("save:attention")
        assert sizes == sorted([*given, result, result // H])


def test_what_is_no_number_stays_so_in_a_merger():
    ones = jnp.ones((1, 3, 1, 1))
    log_sums = jnp.asarray([0.0, jnp.nan, -jnp.inf]).reshape(ones.shape)
    results = jnp.asarray([jnp.nan, 2.0, 2.0]).reshape(*ones.shape, 1)
    part = meeting.Result(results, log_sums)
    out, _ = meeting.merged(part, meeting.Result(jnp.ones_like(results), ones))
    np.testing.assert_array_equal(out.reshape(-1), [jnp.nan, jnp.nan, 1.0])


def test_every_device_has_the_same_work():
    """Keys that the queries of a part see; as the rows are, the last part sees most."""
    length, parts = 64, 4
    as_it_is = np.arange(length).reshape(parts, -1) + 1
    order_T = context.row_order(length, parts=parts, way="ring")
    balanced = order_T.reshape(parts, -1) + 1
    assert sorted(order_T) == list(range(length))
    assert as_it_is.sum(1).max() > 1.7 * as_it_is.sum(1).mean()
    assert balanced.sum(1).max() == balanced.sum(1).min()


def test_rows_that_cannot_be_cut_in_balanced_parts_are_refused():
    with pytest.raises(ValueError, match="take a multiple of 8"):
        context.row_order(12, parts=4, way="ring")
    assert context.row_order(12, parts=4, way="ulysses") is None
    assert context.row_order(12, parts=1, way="ring") is None


def test_every_turn_of_a_ring_computes_half_of_the_scores():
    """Of each pair of device and turn: the scores computed hold all that are seen."""
    length, parts = 48, 4
    places = context.row_order(length, parts=parts, way="ring").reshape(parts, 2, -1)
    for here in range(parts):
        for step in range(1, parts):
            keys = places[(here - step) % parts]
            seen = keys.reshape(-1)[None, :] <= places[here].reshape(-1)[:, None]
            assert seen.sum() == seen.size / 2
            half = length // (2 * parts)
            if (here - step) % parts < here:
                assert seen[:, :half].all()
            else:
                assert seen[half:].all()


def test_what_one_device_meets_is_that_of_cudnn(monkeypatch):
    """Queries that see none of the keys among them; the log-sum-exp in float32."""
    kernels_anywhere.allow(monkeypatch)
    rng = np.random.default_rng(3)
    T, S = 24, 16
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    q, k, v, g = (draw(1, n, 1, *h) for n, *h in ((T, 2, 8), (S, 8), (S, 8), (T, 2, 8)))
    segments = jnp.asarray(rng.integers(1, 3, (1, T)), jnp.int32).at[0, T - 4 :].set(3)
    queries = meeting.Queries(q, jnp.arange(T) + S, segments)
    keys = meeting.Keys(k, v, jnp.arange(S), segments[:, :S])

    @functools.partial(jax.jit, static_argnames=("pass_", "kernel"))
    def met(pass_, kernel, *given):
        return pass_(
            queries, keys, *given, kernel=kernel, window=0, softcap=0.0, seen="all"
        )

    plain = met(meeting.forward, "xla")
    fused = met(meeting.forward, "cudnn")
    sees = slice(0, T - 4)
    assert (fused.log_sum_BTKG[:, T - 4 :] < -1e4).all()
    for got, want in zip(fused, plain, strict=True):
        np.testing.assert_allclose(
            got[:, sees], want[:, sees], atol=BFLOAT16_ROUNDING, rtol=BFLOAT16_ROUNDING
        )
    # The scores of bfloat16 queries and keys are summed in float32.
    np.testing.assert_allclose(
        fused.log_sum_BTKG[:, sees], plain.log_sum_BTKG[:, sees], atol=1e-5
    )
    log_sum_BTKG = jnp.logaddexp(plain.log_sum_BTKG, 0.3)
    out_BTKGH = (plain.out_BTKGH * 0.7).astype(jnp.bfloat16)
    asked = meeting.asked(g, out_BTKGH, log_sum_BTKG)
    plain = met(meeting.backward, "xla", asked)
    fused = met(meeting.backward, "cudnn", asked)
    for got, want in zip(fused, plain, strict=True):
        far = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
        assert far < BFLOAT16_ROUNDING


def test_what_one_device_meets_is_that_of_the_splash_kernel():
    """The kernel's program, interpreted, for a part of the keys in both directions."""
    rng = np.random.default_rng(3)
    T, S = 256, 128
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v, g = (draw(1, n, 1, *h) for n, *h in ((T, 2, 8), (S, 8), (S, 8), (T, 2, 8)))
    segments = jnp.asarray(rng.integers(1, 3, (1, T)), jnp.int32)
    queries = meeting.Queries(q, jnp.arange(T) + S, segments)
    keys = meeting.Keys(k, v, jnp.arange(S), segments[:, :S])
    settings = {"window": 0, "softcap": 0.0, "seen": "all"}
    plain = meeting.forward(queries, keys, kernel="xla", **settings)
    scaled = queries._replace(q_BTKGH=meeting.ready(q, "splash"))
    fused = meeting.forward(scaled, keys, kernel="splash", **settings)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=FLOAT32_ROUNDING),
        plain,
        fused,
    )
    # As if other keys had been met too: the log-sum-exp is that of all of them.
    asked = meeting.asked(g, plain.out_BTKGH * 0.7, plain.log_sum_BTKG + 0.3)
    plain = meeting.backward(queries, keys, asked, kernel="xla", **settings)
    fused = meeting.backward(scaled, keys, asked, kernel="splash", **settings)
    fused = (fused[0] / math.sqrt(q.shape[-1]), *fused[1:])
    for got, want in zip(fused, plain, strict=True):
        np.testing.assert_allclose(got, want, atol=10 * FLOAT32_ROUNDING)
