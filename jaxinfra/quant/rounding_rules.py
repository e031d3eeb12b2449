"""A matrix in few bits by three rules: to the nearest, GPTQ, and AWQ.

All work on one matrix w_NO (N inputs, O outputs) and what calibration found of its
inputs: hessian_NN, the sum of x x^T, and magnitude_N, the sum of |x|. Groups of `group`
neighbouring inputs share a scale for each output; group N is per channel. Everything is
float32. The error that counts is that of the outputs, tr(d^T hessian d) of the change d
of w.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra.quant import formats
from jaxinfra.quant.formats import FormatName

# Parts of a group's largest magnitude that its scale may reach up to: what is beyond is
# cut off, which pays where few weights are large. Source: the published code of both.
REACHES = tuple(1.0 - 0.04 * i for i in range(11))
# Exponents of the inputs' magnitudes among which AWQ's factors are sought; 0: none.
EXPONENTS = tuple(i / 10 for i in range(10))
DAMPING = 0.01  # of the mean of the Hessian's diagonal. Source: arXiv:2210.17323
BLOCK = 128  # inputs after which GPTQ updates all that follow


class Rounded(NamedTuple):
    """w_NO: what the codes stand for. scales_GO: of each group. factors_N: that w is to
    be multiplied by, 1 but for AWQ."""

    w_NO: jax.Array
    scales_GO: jax.Array
    factors_N: jax.Array


def nearest(w_NO: jax.Array, form: FormatName, group: int) -> Rounded:
    """Every weight to the nearest code, scales reaching to the largest magnitudes."""
    scales_GO = _largest_scales(w_NO, form, group)
    rounded_NO = _round(w_NO, _spread(scales_GO, group), form)
    return Rounded(rounded_NO, scales_GO, jnp.ones(len(w_NO)))


def gptq(
    w_NO: jax.Array, hessian_NN: jax.Array, form: FormatName, group: int
) -> Rounded:
    """Input by input: rounded, and the error made good by the inputs that follow.

    Source: arXiv:2210.17323 algorithm 1; a group's scales are chosen when its turn
    comes, as in the published code.
    """
    N = len(w_NO)
    diagonal_N = jnp.diagonal(hessian_NN)
    is_dead_N = diagonal_N == 0  # an input that was never seen
    w_NO = jnp.where(is_dead_N[:, None], 0.0, w_NO)
    damping = DAMPING * jnp.mean(diagonal_N)
    damped_NN = hessian_NN + jnp.diag(jnp.where(is_dead_N, 1.0, 0.0) + damping)
    # Rows of the upper Cholesky factor of the inverse: how the inputs after one make
    # good what it lacks.
    lower_NN = jnp.linalg.cholesky(damped_NN)
    half_NN = jax.scipy.linalg.solve_triangular(lower_NN, jnp.eye(N), lower=True)
    upper_NN = jnp.linalg.cholesky(half_NN.T @ half_NN).T
    size = group if group < N else max(d for d in range(1, BLOCK + 1) if N % d == 0)
    per_channel_GO = _best_scales(w_NO, diagonal_N, form, group)

    def block(b, state):
        w_NO, rounded_NO, scales_BO = state
        first = b * size
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size)
        w_bO, upper_bN = rows(w_NO), rows(upper_NN)
        upper_bb = jax.lax.dynamic_slice_in_dim(upper_bN, first, size, axis=1)
        scale_O = per_channel_GO[0]
        if group < N:
            scale_O = _best_scales(w_bO, rows(diagonal_N), form, group)[0]

        def one(i, state):
            w_bO, rounded_bO, errors_bO = state
            row_O = w_bO[i]
            found_O = _round(row_O, scale_O, form)
            error_O = (row_O - found_O) / upper_bb[i, i]
            after_b = jnp.where(jnp.arange(size) > i, upper_bb[i], 0.0)
            return (
                w_bO - after_b[:, None] * error_O,
                rounded_bO.at[i].set(found_O),
                errors_bO.at[i].set(error_O),
            )

        zeros_bO = jnp.zeros_like(w_bO)
        _, rounded_bO, errors_bO = jax.lax.fori_loop(
            0, size, one, (w_bO, zeros_bO, zeros_bO)
        )
        is_after_N = jnp.arange(N) >= first + size
        w_NO -= jnp.where(is_after_N, upper_bN, 0.0).T @ errors_bO
        put = jax.lax.dynamic_update_slice_in_dim
        return (
            w_NO,
            put(rounded_NO, rounded_bO, first, axis=0),
            scales_BO.at[b].set(scale_O),
        )

    with jax.default_matmul_precision("highest"):
        state = (w_NO, jnp.zeros_like(w_NO), jnp.zeros_like(w_NO[::size]))
        _, rounded_NO, scales_BO = jax.lax.fori_loop(0, N // size, block, state)
    scales_GO = scales_BO if group < N else per_channel_GO
    return Rounded(rounded_NO, scales_GO, jnp.ones(N))


def awq(
    w_NO: jax.Array,
    hessian_NN: jax.Array,
    magnitude_N: jax.Array,
    form: FormatName,
    group: int,
) -> Rounded:
    """To the nearest, after inputs were scaled by the power of their mean magnitudes
    that makes the error of the outputs least; then scales reach as far as pays, if it
    does. Never worse for the calibration's outputs than rounding as it is.

    Source: arXiv:2306.00978 eq. 4 and 5; the error is taken by the Hessian and not by
    running the layer again.
    """
    diagonal_N = jnp.diagonal(hessian_NN)

    def powers(exponent: jax.Array) -> jax.Array:
        powers_N = jnp.maximum(magnitude_N, 1e-4 * jnp.mean(magnitude_N)) ** exponent
        return powers_N / jnp.sqrt(jnp.max(powers_N) * jnp.min(powers_N))

    def error(exponent: jax.Array) -> jax.Array:
        powers_N = powers(exponent)
        rounded = nearest(w_NO * powers_N[:, None], form, group)
        rounded = rounded._replace(factors_N=1.0 / powers_N)
        return output_error(w_NO, rounded, hessian_NN)

    exponents = jnp.array(EXPONENTS)
    powers_N = powers(exponents[jnp.argmin(jax.lax.map(error, exponents))])
    grown_NO = w_NO * powers_N[:, None]
    scales_GO = _best_scales(grown_NO, diagonal_N / powers_N**2, form, group)
    rounded_NO = _round(grown_NO, _spread(scales_GO, group), form)
    cut = Rounded(rounded_NO, scales_GO, 1.0 / powers_N)
    uncut = nearest(grown_NO, form, group)._replace(factors_N=1.0 / powers_N)
    errors = [output_error(w_NO, found, hessian_NN) for found in (cut, uncut)]
    return jax.tree.map(lambda c, u: jnp.where(errors[0] < errors[1], c, u), cut, uncut)


def output_error(w_NO: jax.Array, rounded: Rounded, hessian_NN: jax.Array) -> jax.Array:
    """Squared error of the outputs, over that of outputs that are all zero."""
    d_NO = rounded.w_NO * rounded.factors_N[:, None] - w_NO

    def of(x_NO: jax.Array) -> jax.Array:
        highest = jax.lax.Precision.HIGHEST
        return jnp.sum(x_NO * jnp.matmul(hessian_NN, x_NO, precision=highest))

    return of(d_NO) / of(w_NO)


def _best_scales(
    w_NO: jax.Array, importance_N: jax.Array, form: FormatName, group: int
) -> jax.Array:
    """Of `REACHES` of each group's largest magnitude, the one with the least squared
    error, an input's weighted by its importance."""
    largest_GO = _largest_scales(w_NO, form, group)

    def step(best, reach):
        scales_GO, least_GO = best
        d_NO = _round(w_NO, _spread(largest_GO * reach, group), form) - w_NO
        weighted_NO = importance_N[:, None] * d_NO**2
        error_GO = jnp.sum(weighted_NO.reshape(-1, group, w_NO.shape[1]), axis=1)
        is_less_GO = error_GO < least_GO
        scales_GO = jnp.where(is_less_GO, largest_GO * reach, scales_GO)
        return (scales_GO, jnp.minimum(error_GO, least_GO)), None

    start = (largest_GO, jnp.full_like(largest_GO, jnp.inf))
    return jax.lax.scan(step, start, jnp.array(REACHES))[0][0]


def _largest_scales(w_NO: jax.Array, form: FormatName, group: int) -> jax.Array:
    grouped_GgO = jnp.abs(w_NO).reshape(-1, group, w_NO.shape[1])
    return formats.scale_for(jnp.max(grouped_GgO, axis=1), form)


def _spread(scales_GO: jax.Array, group: int) -> jax.Array:
    return jnp.repeat(scales_GO, group, axis=0)


def _round(w: jax.Array, scale: jax.Array, form: FormatName) -> jax.Array:
    """The numbers that the codes of `w` stand for."""
    return formats.values_of(formats.round_to(w / scale, form), form) * scale
