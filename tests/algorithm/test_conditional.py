"""BCOS's second moment: what its formula promises."""

import numpy as np
import pytest

import keras_blockwise as kb
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import slots_of
from helpers.training import built
from helpers.training import train

SHAPES = {"dense/kernel": (2, 3), "dense/bias": (3,)}


def changes(gradients, **kwargs):
    variables = make_variables(SHAPES, "float64")
    before = [variable.numpy() for variable in variables]
    optimizer = kb.BCOS(0.125, epsilon=0.0, jit_compile=False, **kwargs)
    after = train(optimizer, variables, gradients)[: len(before)]
    return [x - y for x, y in zip(after, before)]


def test_first_step_is_the_sign_of_the_gradient():
    (gradients,) = make_gradients(1, SHAPES)
    for change, g in zip(changes([gradients]), gradients):
        np.testing.assert_allclose(change, -0.125 * np.sign(g), 1e-12)


def test_step_of_a_constant_gradient_is_the_learning_rate():
    gradients = make_gradients(1, SHAPES)
    for change, g in zip(changes(gradients * 7), *gradients):
        np.testing.assert_allclose(change, -0.875 * np.sign(g), 1e-12)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_gradient_that_comes_later_starts_from_zero():
    gradients = make_gradients(2, SHAPES)
    late = [[gradients[0][0], None], gradients[1]]
    bias = changes(late)[1]
    np.testing.assert_allclose(bias, -0.125 * np.sign(gradients[1][1]), 1e-12)


def test_state_is_one_number_per_weight():
    optimizer = built(kb.BCOS(blocking="layer"), make_variables(SHAPES))
    names = {"dense_kernel_momentum": 6, "dense_bias_momentum": 3}
    state = {name: value.size for name, value in slots_of(optimizer).items()}
    assert state == names
    assert not slots_of(built(kb.BCOS(momentum=0.0), make_variables(SHAPES)))
