"""SPAM's limits and resets, seen in what the weights do."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_close
from helpers.arrays import assert_same
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.training import built
from helpers.training import graph
from helpers.training import train

SHAPES = {"dense/kernel": (2, 3), "dense/bias": (3,)}


def spam(**kwargs):
    return kb.SPAM(**{"learning_rate": 0.125, "jit_compile": False, **kwargs})


def steps_of(optimizer, numbers):
    """What each of some gradients changes in a single weight."""
    weight = keras.Variable(0.0, dtype="float64")
    apply = graph(built(optimizer, [weight]))
    values = [0.0]
    for g in numbers:
        apply([keras.ops.convert_to_tensor(g, "float64")])
        values.append(float(weight))
    return np.diff(values)


def test_is_adam_until_the_first_spike_or_reset():
    options = {"beta_1": 0.875, "beta_2": 1 - 2.0**-9, "epsilon": 2.0**-20}
    adam = keras.optimizers.Adam(0.125, **options)
    results = [
        train(
            optimizer,
            make_variables(SHAPES, "float64"),
            make_gradients(24, SHAPES),
            graph,
        )
        for optimizer in (spam(**options), adam)
    ]
    assert_close(*results, 1e-12)


@pytest.mark.parametrize(
    "restart, first, largest", [(True, 0.01, 1.0), (False, 0.0198, 2.247)]
)
def test_steps_of_a_constant_gradient(restart, first, largest):
    optimizer = spam(reset_bias_correction=restart, epsilon=0.0)
    steps = steps_of(optimizer, np.ones(1200)) / -0.125
    np.testing.assert_allclose(steps[499], first, 5e-3)
    np.testing.assert_allclose(steps.max(), largest, 5e-4)
    assert (steps[:499] > 0.99999).all()  # No warm-up at the start.
    assert (np.diff(steps[499:599]) > 0).all()


def test_a_weight_without_gradients_so_far_is_not_stuck():
    steps = steps_of(spam(), [0.0] * 30 + [1.0] * 5)
    assert not steps[:30].any() and (steps[30:] < 0).all()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("before, guarded", [(0, 19), (49, 20)])
def test_nothing_is_cut_in_the_first_steps(before, guarded, cut):
    """From the start, and from the reset in step 50 on."""
    optimizer = spam(reset_every=50, reset_warmup=0)
    steps = guarded if cut else guarded - 1
    steps_of(optimizer, [1.0] * (before + steps) + [1e6])
    momentum, _ = optimizer.block_state.values()
    limit = np.sqrt(5000 * (1 - 0.999**steps)) if cut else 1e6
    expected = 0.9 * (1 - 0.9**steps) + 0.1 * limit
    np.testing.assert_allclose(momentum, expected, 1e-9)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_skip_nonfinite_looks_at_the_gradient_as_it_came(value):
    gradients = make_gradients(30, SHAPES)
    damaged = [[g.copy() for g in given] for given in gradients]
    damaged.insert(25, [np.full(s, value) for s in SHAPES.values()])
    optimizers = [spam(skip_nonfinite=True) for _ in range(2)]
    results = [
        train(optimizer, make_variables(SHAPES), given, graph)[:2]
        for optimizer, given in zip(optimizers, (gradients, damaged))
    ]
    assert_same(*results)
    assert [int(o.skipped_steps) for o in optimizers] == [0, 1]
