"""GPTQ, AWQ and nearest rounding by numpy loops in float64, written from the papers.

Source: arXiv:2210.17323 algorithm 1 (GPTQ, without its lazy batches: each error is made
good at once), arXiv:2306.00978 section 3.2 (AWQ).
"""

import numpy as np

NF4 = np.array(
    [
        -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1,
    ]
)  # fmt: skip
GRIDS = {
    "int8": np.arange(-127.0, 128),
    "int4": np.arange(-7.0, 8),
    "nf4": NF4,
}
REACHES = [1 - 0.04 * i for i in range(11)]
EXPONENTS = [i / 10 for i in range(10)]


def round_to(w, scale, form):
    """The number of the scaled grid next to each of `w`."""
    grid = GRIDS[form]
    at = np.abs(w[..., None] / scale[..., None] - grid).argmin(-1)
    return grid[at] * scale


def largest(w_gO, form):
    return np.abs(w_gO).max(axis=0) / GRIDS[form][-1]


def best(w_gO, importance_g, form):
    """For each output the scale with the least weighted error."""
    scale_O = np.zeros(w_gO.shape[1])
    for o in range(w_gO.shape[1]):
        tried = [largest(w_gO, form)[o] * reach for reach in REACHES]
        errors = [
            (
                importance_g
                * (round_to(w_gO[:, o], np.full(len(w_gO), s), form) - w_gO[:, o]) ** 2
            ).sum()
            for s in tried
        ]
        scale_O[o] = tried[int(np.argmin(errors))]
    return scale_O


def nearest(w_NO, form, group):
    out = np.zeros_like(w_NO)
    for first in range(0, len(w_NO), group):
        w_gO = w_NO[first : first + group]
        scale_gO = np.broadcast_to(largest(w_gO, form), w_gO.shape)
        out[first : first + group] = round_to(w_gO, scale_gO, form)
    return out


def gptq(w_NO, hessian_NN, form, group):
    w_NO, out = w_NO.copy(), np.zeros_like(w_NO)
    N = len(w_NO)
    damped = hessian_NN + 0.01 * np.mean(np.diag(hessian_NN)) * np.eye(N)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    whole_O = best(w_NO, np.diag(hessian_NN), form)
    for n in range(N):
        if n % group == 0 and group < N:
            part = slice(n, n + group)
            scale_O = best(w_NO[part], np.diag(hessian_NN)[part], form)
        out[n] = round_to(w_NO[n], whole_O if group == N else scale_O, form)
        error_O = (w_NO[n] - out[n]) / upper[n, n]
        w_NO[n + 1 :] -= np.outer(upper[n, n + 1 :], error_O)
    return out


def output_error(w_NO, rounded_NO, hessian_NN):
    d_NO = rounded_NO - w_NO
    return np.trace(d_NO.T @ hessian_NN @ d_NO) / np.trace(w_NO.T @ hessian_NN @ w_NO)


def awq(w_NO, hessian_NN, magnitude_N, form, group):
    """(what the weight stands for, the exponent)."""

    def powers(exponent):
        p = magnitude_N**exponent
        return (p / np.sqrt(p.max() * p.min()))[:, None]

    errors = [
        output_error(
            w_NO, nearest(w_NO * powers(e), form, group) / powers(e), hessian_NN
        )
        for e in EXPONENTS
    ]
    exponent = EXPONENTS[int(np.argmin(errors))]
    uncut = nearest(w_NO * powers(exponent), form, group) / powers(exponent)
    grown_NO, out = w_NO * powers(exponent), np.zeros_like(w_NO)
    importance_N = np.diag(hessian_NN) / powers(exponent)[:, 0] ** 2
    for first in range(0, len(w_NO), group):
        part = slice(first, first + group)
        scale_O = best(grown_NO[part], importance_N[part], form)
        out[part] = round_to(
            grown_NO[part], np.broadcast_to(scale_O, grown_NO[part].shape), form
        )
    found = [uncut, out / powers(exponent)]
    return min(found, key=lambda x: output_error(w_NO, x, hessian_NN)), exponent
