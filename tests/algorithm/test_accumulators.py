"""Accumulators and momentum rules are the weighted averages they claim."""

import math

import numpy as np
import pytest
from keras import ops

from keras_blockwise.algorithm import accumulators
from keras_blockwise.algorithm import momentum

STEPS = range(1, 21)
VALUES = np.exp(np.random.default_rng(0).normal(size=20))


def binomial(n, k):
    """`n` over `k`, also for numbers that are not integers."""
    return math.gamma(n + 1) / math.gamma(k + 1) / math.gamma(n - k + 1)


def constant(value):
    return ops.convert_to_tensor(value, "float64")


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
        decay, gain, correction = accumulator(constant(t))
        v = decay * v + gain * VALUES[t - 1]
        weighted = sum(weight(i, t) * VALUES[i - 1] for i in range(1, t + 1))
        np.testing.assert_allclose(
            v / correction, weighted / total(t), rtol=1e-12
        )


def test_polynomial_of_power_0_is_the_mean():
    v = 0.0
    for t in STEPS:
        decay, gain, correction = accumulators.polynomial(0.0)(constant(t))
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


def directions(rule, xs=VALUES):
    """The state and direction after each step."""
    m, results = constant(0.0), []
    for t, x in enumerate(xs, start=1):
        m, direction = rule.at(constant(t))(m, constant(x))
        results.append((np.float64(m), np.float64(direction)))
    return np.transpose(results)


def weighted_sums(weight):
    return [
        sum(weight(i, t) * VALUES[i - 1] for i in range(1, t + 1))
        for t in STEPS
    ]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_ema_is_the_weighted_average(beta):
    m, direction = directions(momentum.ema(beta))
    sums = weighted_sums(lambda i, t: (1 - beta) * beta ** (t - i))
    totals = [
        sum((1 - beta) * beta ** (t - i) for i in range(1, t + 1))
        for t in STEPS
    ]
    np.testing.assert_allclose(m, sums, rtol=1e-13)
    np.testing.assert_allclose(direction, np.divide(sums, totals), rtol=1e-13)


def test_ema_of_a_constant_is_the_constant():
    _, direction = directions(momentum.ema(0.9), np.full(20, 3.0))
    np.testing.assert_allclose(direction, 3.0, rtol=1e-13)


def test_heavy_ball_is_the_weighted_sum():
    m, direction = directions(momentum.heavy_ball(0.9))
    np.testing.assert_allclose(
        m, weighted_sums(lambda i, t: 0.9 ** (t - i)), rtol=1e-13
    )
    np.testing.assert_array_equal(m, direction)


def test_heavy_ball_is_ema_on_another_scale():
    ema, _ = directions(momentum.ema(0.9))
    heavy_ball, _ = directions(momentum.heavy_ball(0.9))
    np.testing.assert_allclose(ema / (1 - 0.9), heavy_ball, rtol=1e-13)


def test_nesterov_looks_one_step_ahead():
    m, direction = directions(momentum.nesterov(0.9))
    heavy_ball, _ = directions(momentum.heavy_ball(0.9))
    np.testing.assert_allclose(m, heavy_ball, rtol=1e-13)
    # x, and what all past x and this one would move the weights by next.
    ahead = weighted_sums(lambda i, t: 0.9 ** (t - i + 1) + (i == t))
    np.testing.assert_allclose(direction, ahead, rtol=1e-13)


def test_none_has_no_state_and_changes_nothing():
    _, direction = directions(momentum.none())
    np.testing.assert_array_equal(direction, VALUES)
    assert not momentum.none().has_state


@pytest.mark.parametrize("rule", ["ema", "heavy_ball", "nesterov"])
def test_momentum_has_state(rule):
    assert getattr(momentum, rule)(0.9).has_state
