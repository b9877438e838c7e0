"""Momentum rules are the weighted sums they claim."""

import numpy as np
import pytest
from keras import ops

from keras_blockwise.algorithm import momentum

STEPS = range(1, 21)
VALUES = np.exp(np.random.default_rng(0).normal(size=20))


def constant(value):
    return ops.convert_to_tensor(value, "float64")


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
