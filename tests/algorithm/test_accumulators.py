"""Accumulators are the weighted averages they claim."""

import math

import numpy as np
import pytest
from keras import ops

from keras_blockwise.algorithm import accumulators

STEPS = range(1, 21)
VALUES = np.exp(np.random.default_rng(0).normal(size=20))


def binomial(n, k):
    """`n` over `k`, also for numbers that are not integers."""
    return math.gamma(n + 1) / math.gamma(k + 1) / math.gamma(n - k + 1)


# Name -> accumulator, weight of step i among the first t, and what to divide
# the weighted sum by.
AVERAGES = {
    "exponential": (
        accumulators.exponential(0.9),
        lambda i, t: 0.1 * 0.9 ** (t - i),
        lambda t: sum(0.1 * 0.9 ** (t - i) for i in range(1, t + 1)),
    ),
    "exponential_0": (
        accumulators.exponential(0.0),
        lambda i, t: float(i == t),
        lambda t: 1.0,
    ),
    "uncorrected_exponential": (
        accumulators.uncorrected_exponential(0.9),
        lambda i, t: 0.1 * 0.9 ** (t - i),
        lambda t: 1.0,
    ),
    "cumulative": (
        accumulators.cumulative(),
        lambda i, t: 1.0,
        lambda t: 1.0,
    ),
    **{
        f"polynomial_{power}": (
            accumulators.polynomial(power),
            lambda i, t, power=power: binomial(i + power - 1, power),
            lambda t, power=power: sum(
                binomial(i + power - 1, power) for i in range(1, t + 1)
            ),
        )
        for power in (0.0, 1.0, 2.5, 3.0)
    },
}


@pytest.mark.parametrize(
    "accumulator, weight, total", AVERAGES.values(), ids=AVERAGES.keys()
)
def test_accumulator_is_the_weighted_average(accumulator, weight, total):
    v = 0.0
    for t in STEPS:
        decay, gain, correction = accumulator(
            ops.convert_to_tensor(t, "float64")
        )
        v = decay * v + gain * VALUES[t - 1]
        weighted = sum(weight(i, t) * VALUES[i - 1] for i in range(1, t + 1))
        np.testing.assert_allclose(
            v / correction, weighted / total(t), rtol=1e-12
        )


def test_polynomial_of_power_0_is_the_mean():
    v = 0.0
    for t in STEPS:
        step = ops.convert_to_tensor(t, "float64")
        decay, gain, correction = accumulators.polynomial(0.0)(step)
        v = decay * v + gain * VALUES[t - 1]
        np.testing.assert_allclose(v / correction, VALUES[:t].mean(), 1e-14)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999999])
@pytest.mark.parametrize("t", [1, 2, 10, 1000, 10**6])
def test_one_minus_power_is_accurate_in_float32(beta, t):
    """`1 - beta**t` in float32 is off by 1e-5 for 0.999 at t = 1."""
    power = accumulators.one_minus_power(
        beta, ops.convert_to_tensor(t, "float32")
    )
    expected = -math.expm1(t * math.log(beta)) if beta else 1.0
    np.testing.assert_allclose(np.float64(power), expected, rtol=1e-6)
