"""The random numbers, and that rounding is right on average."""

import numpy as np
import pytest
from keras import ops
from keras.ops import convert_to_numpy as to_numpy

from helpers import eight_bits
from keras_blockwise.algorithm import rounding
from keras_blockwise.algorithm.rounding import UNIT
from keras_blockwise.algorithm.rounding import WEIGHT

SHAPES = [(), (1,), (5,), (3, 4), (4, 4), (2, 3, 5)]


def draw(step, variable, shape, *args):
    step = ops.convert_to_tensor(step, "int32")
    return to_numpy(rounding.random_numbers(step, variable, shape, *args))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_numbers_are_those_of_the_generator(shape):
    for step, variable, purpose in [
        (0, 0, 0),
        (7, 3, 1),
        (2**31 - 1, 2**30, 0),
    ]:
        numbers = draw(step, variable, shape, purpose)
        expected = eight_bits.random_numbers(
            step, variable, shape or (1,), purpose
        )
        assert numbers.dtype == "int32" and numbers.shape == shape
        np.testing.assert_array_equal(numbers / UNIT, expected.reshape(shape))


def test_numbers_of_each_entry():
    """Where variables are joined: each as if it were drawn by itself there."""
    numbers = draw(3, np.array([[5, 5], [9, 9]]), (2, 2))
    for row, variable in enumerate((5, 9)):
        np.testing.assert_array_equal(
            numbers[row], draw(3, variable, (2, 2))[row]
        )


@pytest.mark.parametrize(
    "other", [(8, 3, 0), (7, 4, 0), (7, 3, WEIGHT)], ids=str
)
def test_others_are_independent(other):
    shape = (200, 300)
    own = draw(7, 3, shape, 0) / UNIT
    assert abs(own.mean() - 0.5) < 0.005
    assert abs(own.var() - 1 / 12) < 0.002
    step, variable, purpose = other
    their = draw(step, variable, shape, purpose) / UNIT
    assert abs(np.corrcoef(own.ravel(), their.ravel())[0, 1]) < 0.02


def test_neighbours_are_independent():
    numbers = draw(7, 3, (200, 300))
    for x, y in [
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
    ]:
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.02


def test_rounded():
    x = np.array([-2.5, -2.0, -0.25, 0.0, 0.75, 126.5], np.float32)
    fixed = ops.convert_to_tensor(x * UNIT)
    for u in (0.0, 0.25, 0.5, 1.0 - 1.0 / UNIT):
        noise = ops.convert_to_tensor(int(u * UNIT), "int32")
        np.testing.assert_array_equal(
            to_numpy(rounding.rounded(fixed, noise)), np.floor(x + u)
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
class TestSixteenBits:
    def round(self, x, dtype, step=0):
        x = ops.convert_to_tensor(np.float32(x))
        step = ops.convert_to_tensor(step, "int32")
        noise = rounding.random_numbers(step, 0, tuple(x.shape), WEIGHT)
        return to_numpy(rounding.rounded_to(dtype, x, noise))

    def representable(self, x, dtype):
        x = ops.cast(ops.convert_to_tensor(np.float32(x)), dtype)
        return to_numpy(ops.cast(x, "float32"))

    def test_numbers_that_it_can_hold_stay(self, dtype):
        rng = np.random.default_rng(0)
        x = [*rng.normal(0.0, 1.0, 500), 0.0, -1.0, 1.0, 2.0, 6e-5, 1e-7, 6e4]
        x = self.representable(x, dtype)
        for step in range(5):
            np.testing.assert_array_equal(self.round(x, dtype, step), x)

    @pytest.mark.parametrize("x", [1.0001, -0.7, 3.14159, 2e-5, -3e-7, 1.99999])
    def test_right_on_average(self, dtype, x):
        many = self.round(np.full(40000, x), dtype).astype(np.float64)
        low, high = np.unique(many)
        np.testing.assert_array_equal(
            self.representable([low, high], dtype), [low, high]
        )
        assert low < np.float32(x) < high
        assert abs(many.mean() - x) < 0.02 * (high - low)

    def test_what_is_not_finite_is_so_afterwards(self, dtype):
        x = self.round([np.inf, -np.inf, np.nan], dtype)
        assert not np.isfinite(x).any()
