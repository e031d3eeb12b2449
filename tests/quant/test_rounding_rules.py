"""GPTQ, AWQ and nearest rounding of a matrix, against numpy written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant import naive_rounding as naive

from jaxinfra.quant import rounding_rules

N, OUTPUTS, TOKENS = 24, 5, 60
CASES = [("int4", 8), ("int4", N), ("int8", N), ("nf4", 8)]
# float32 against float64: a weight that stands between two codes may go to either, and
# GPTQ then hands on another error. Most weights must be the same number.
SAME_NUMBER = 1e-5
MOST = 0.97
# And where some differ, outputs are as good.
AS_GOOD = 0.02


@pytest.fixture(scope="module")
def matrix():
    """(weights, sum of x x^T, sum of |x|) of inputs that go together and differ in
    size, as those of a model do."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(N, N)) * np.exp(rng.normal(size=N))
    x = rng.normal(size=(TOKENS, N)) @ mixing
    return rng.normal(size=(N, OUTPUTS)), x.T @ x, np.abs(x).sum(axis=0)


def in_float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def check(found, expected, w, hessian):
    is_same = np.abs(found - expected) <= SAME_NUMBER * np.abs(w).max()
    assert is_same.mean() >= MOST
    errors = [naive.output_error(w, x, hessian) for x in (found, expected)]
    np.testing.assert_allclose(*errors, rtol=AS_GOOD)


@pytest.mark.parametrize(("form", "group"), CASES)
def test_nearest_is_the_nearest_code(matrix, form, group):
    w, hessian, _ = matrix
    found = rounding_rules.nearest(*in_float32(w), form, group)
    check(np.asarray(found.w_NO), naive.nearest(w, form, group), w, hessian)


@pytest.mark.parametrize(("form", "group"), CASES)
def test_gptq_is_that_of_the_paper(matrix, form, group):
    w, hessian, _ = matrix
    found = rounding_rules.gptq(*in_float32(w, hessian), form, group)
    check(np.asarray(found.w_NO), naive.gptq(w, hessian, form, group), w, hessian)


@pytest.mark.parametrize(("form", "group"), CASES)
def test_awq_is_that_of_the_paper(matrix, form, group):
    w, hessian, magnitude = matrix
    found = rounding_rules.awq(*in_float32(w, hessian, magnitude), form, group)
    expected, _ = naive.awq(w, hessian, magnitude, form, group)
    weight = np.asarray(found.w_NO * found.factors_N[:, None])
    check(weight, expected, w, hessian)


@pytest.mark.parametrize(("form", "group"), CASES)
@pytest.mark.slow
def test_what_is_calibrated_gives_better_outputs(matrix, form, group):
    w, hessian, magnitude = in_float32(*matrix)
    near = rounding_rules.nearest(w, form, group)
    error = lambda rounded: float(rounding_rules.output_error(w, rounded, hessian))
    assert error(rounding_rules.gptq(w, hessian, form, group)) < 0.7 * error(near)
    found = rounding_rules.awq(w, hessian, magnitude, form, group)
    assert error(found) < 0.95 * error(near)


def test_an_input_that_was_never_seen_is_no_trouble(matrix):
    w, hessian, _ = matrix
    hessian = hessian.copy()
    hessian[3], hessian[:, 3] = 0.0, 0.0
    found = rounding_rules.gptq(*in_float32(w, hessian), "int4", 8)
    assert np.isfinite(found.w_NO).all()
    assert not np.asarray(found.w_NO[3]).any()


def test_inputs_that_are_one_input_leave_nothing_to_correct_and_no_nan():
    ones = jnp.ones((8, 8))
    found = rounding_rules.gptq(
        jax.random.normal(jax.random.key(0), (8, 3)), ones, "int4", 8
    )
    assert np.isfinite(found.w_NO).all()
