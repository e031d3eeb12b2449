"""Attention and its gradient written out in float64: the reference of the kernels."""

import numpy as np


def forward_backward(q_BTKGH, k_BSKH, v_BSKH, g_BTKGH, segments_BT, *, window, softcap):
    """(result, dq, dk, dv) of causal attention, with cotangent `g_BTKGH`."""
    q, k, v, g = (np.float64(x) for x in (q_BTKGH, k_BSKH, v_BSKH, g_BTKGH))
    T, scale = q.shape[1], q.shape[-1] ** -0.5
    raw = np.einsum("BTKGH,BSKH->BKGTS", q, k) * scale
    capped = softcap * np.tanh(raw / softcap) if softcap else raw
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    seen = np.broadcast_to(distance >= 0, (q.shape[0], T, T))
    if window:
        seen = seen & (distance < window)
    if segments_BT is not None:
        seen = seen & (segments_BT[:, :, None] == segments_BT[:, None, :])
    e = np.exp(capped - capped.max(-1, keepdims=True)) * seen[:, None, None]
    p = e / e.sum(-1, keepdims=True)
    out = np.einsum("BKGTS,BSKH->BTKGH", p, v)
    dv = np.einsum("BKGTS,BTKGH->BSKH", p, g)
    dp = np.einsum("BTKGH,BSKH->BKGTS", g, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True))
    if softcap:
        ds = ds * (1 - (capped / softcap) ** 2)
    dq = np.einsum("BKGTS,BSKH->BTKGH", ds, k) * scale
    dk = np.einsum("BKGTS,BTKGH->BSKH", ds, q) * scale
    return out, dq, dk, dv


def random_inputs(*, B, T, K, G, H):
    """(q, k, v, cotangent, segments with padding at the end), float32 and int32."""
    rng = np.random.default_rng(0)
    shapes = [(B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    # Documents 1, 2, ... then padding, document 0: cut at random places.
    cuts = rng.random((B, T)) < 4 / T
    segments_BT = 1 + np.cumsum(cuts, axis=1).astype(np.int32)
    segments_BT[:, -max(2, T // 8) :] = 0
    return *arrays, segments_BT
