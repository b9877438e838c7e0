"""Keras's default dtype may change between the steps of an optimizer."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.cases import each_class_with
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.training import built
from helpers.training import graph

FLOATX = ["float64", "float16", "bfloat16"]


@pytest.fixture(autouse=True)
def floatx_as_before():
    floatx = keras.config.floatx()
    yield
    keras.config.set_floatx(floatx)


def ends(optimizer, floatx, dtype="float32", wrap=None):
    variables = make_variables(dtype=dtype)
    built(optimizer, variables)
    for step, gradients in enumerate(make_gradients(4)):
        keras.config.set_floatx(floatx if step % 2 else "float32")
        # A function that is made anew, as by another `fit`.
        apply = wrap(optimizer) if wrap else optimizer.apply
        apply(tensors(gradients, dtype))
    keras.config.set_floatx("float32")
    return to_numpy([*variables, *optimizer.variables])


@each_class_with("floatx", FLOATX)
def test_between_eager_steps(case, floatx):
    actual = ends(case.make(0.1), floatx)
    assert_same(actual, ends(case.make(0.1), "float32"))


def test_between_compiled_steps():
    actual = ends(kb.BlockAdam(0.1), "float16", wrap=graph)
    assert_same(actual, ends(kb.BlockAdam(0.1), "float32", wrap=graph))


@pytest.mark.tensorflow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_with_variables_of_another_dtype(dtype):
    options = {"skip_nonfinite": True, "weight_decay": 0.1}
    actual = ends(kb.BAGM(0.1, **options), "float64", dtype)
    assert_same(actual, ends(kb.BAGM(0.1, **options), "float32", dtype))


@pytest.mark.tensorflow
def test_a_callable_learning_rate_is_not_rounded():
    """To what `floatx` can hold, as a variable of Keras would be."""
    keras.config.set_floatx("bfloat16")
    (variable,) = make_variables({"dense/kernel": (1, 1)})
    before = to_numpy([variable])[0]
    kb.BlockAdam(lambda: 0.001, epsilon=0.0).apply(
        tensors([np.ones((1, 1))]), [variable]
    )
    moved = before - to_numpy([variable])[0]
    np.testing.assert_allclose(moved, 0.001, rtol=1e-3)
