"""Tables by which splash knows what blocks of queries see, against whole masks."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.parallel import splash_parts

G, H = 1, 8


def chunks_of(parts, chunk):
    """The places that each device has, in the balanced order."""
    places = np.arange(2 * parts * chunk, dtype=np.int32).reshape(2 * parts, -1)
    return [
        np.concatenate([places[i], places[2 * parts - 1 - i]]) for i in range(parts)
    ]


def kernels(queries_T, keys_S, window):
    array = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    seen = splash_parts.Places(jnp.asarray(queries_T), jnp.asarray(keys_S))
    q, k = array(1, len(queries_T), 1, G, H), array(1, len(keys_S), 1, H)
    return list(splash_parts._kernels(q, k, seen, window, 0.0))


def mask_of(info, block, *, by_key):
    """What the tables of a kernel say, bool [queries, keys]; no block twice."""
    data, number, kind = (
        np.asarray(x[0], np.int32)
        for x in (info.data_next, info.mask_next, info.block_mask)
    )
    assert data.min() >= 0
    if by_key:
        data, number, kind = data.T, number.T, kind.T
    rows = len(data)
    found = {}
    for i, step in np.argwhere(kind):
        assert (i, data[i, step]) not in found
        masks = np.asarray(info.partial_mask_blocks)
        is_whole = kind[i, step] == splash_parts._ALL
        found[i, data[i, step]] = (
            np.ones((block, block), bool) if is_whole else masks[number[i, step]]
        )
    return rows, found


def check(queries_T, keys_S, window):
    away_TS = queries_T[:, None] - keys_S[None]
    seen_TS = (away_TS >= 0) & (away_TS < (window or len(keys_S) * 100))
    met = 0
    for piece, kernel in kernels(queries_T, keys_S, window):
        block = kernel.kwargs["block_sizes"].block_q
        want = seen_TS[piece]
        every = np.asarray(kernel.fwd_mask_info.block_mask).any(axis=-1)
        assert every.all()  # of what meets nothing the kernel would make no number
        for info, by_key in (
            (kernel.fwd_mask_info, False),
            (kernel.dq_mask_info, False),
            (kernel.dkv_mask_info, True),
        ):
            whole = want.T if by_key else want
            rows, found = mask_of(info, block, by_key=by_key)
            assert rows * block == len(whole)
            got = np.zeros_like(whole)
            for (i, j), seen in found.items():
                got[i * block :, j * block :][:block, :block] = seen
            np.testing.assert_array_equal(got, whole)
        assert piece.start == met
        met = piece.stop
    assert met == len(queries_T)


@pytest.mark.parametrize(
    ("parts", "chunk", "windows"),
    [
        (1, 384, [0, 1, 128, 5000]),
        (2, 640, [0, 2, 127, 129, 640]),
        (2, 1024, [0, 512, 513, 1023, 1025]),
        (3, 256, [0, 255, 256, 257, 1535, 1536]),
        (5, 128, [0, 100, 641]),
    ],
)
def test_tables_say_what_is_seen(parts, chunk, windows):
    devices = chunks_of(parts, chunk)
    for window in windows:
        for here in (devices[0], devices[-1]):
            check(here, np.concatenate(devices), window)
            for other in (devices[0], devices[-1]):
                check(here, other, window)


def test_integers_of_a_table_hold_every_block():
    devices = chunks_of(2, 128 * 33)
    check(devices[1], np.concatenate(devices), 300)
    [(_, kernel)] = kernels(devices[1], np.concatenate(devices), 0)
    assert kernel.fwd_mask_info.data_next.dtype == np.int16
    assert kernel.fwd_mask_info.data_next.max() == 131


@pytest.mark.parametrize("window", [0, 300])
def test_tables_that_are_too_large_are_of_fewer_queries(window, monkeypatch):
    """And the results of several calls are those of one."""
    rng = np.random.default_rng(0)
    devices = chunks_of(2, 384)
    here, keys_S = devices[1], np.concatenate(devices)
    T, S = len(here), len(keys_S)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, g = (draw(1, T, 1, G, H) for _ in range(2))
    k, v = (draw(1, S, 1, H) for _ in range(2))
    row = jnp.asarray(rng.integers(1, 3, (1, S)), jnp.int32)
    segments = (row[:, here], row[:, keys_S])
    seen = splash_parts.Places(jnp.asarray(here), jnp.asarray(keys_S))
    how = {"window": window, "softcap": 0.0}

    def both():
        out, log_sum = splash_parts.forward(q, k, v, segments, seen, **how)
        mean = jnp.sum(g * out, axis=-1)
        asked = (log_sum, g, mean)
        return (
            out,
            log_sum,
            *splash_parts.backward(q, k, v, segments, seen, *asked, **how),
        )

    expected = both()
    monkeypatch.setattr(splash_parts, "_SCALAR_BYTES", 40 * splash_parts._TABLES_BYTES)
    assert [piece.stop for piece, _ in kernels(here, keys_S, window)] == [384, 768]
    check(here, keys_S, window)
    for got, want in zip(both(), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
