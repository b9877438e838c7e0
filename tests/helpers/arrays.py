"""Numbers of variables, and whether they are the same."""

from contextlib import contextmanager

import keras
import numpy as np
import pytest


def to_numpy(tensors):
    """A copy of each, which later steps leave as it is."""
    return [np.array(keras.ops.convert_to_numpy(x)) for x in tensors]


def assert_close(actual, expected, rtol, atol=0.0):
    """Of two lists, or of two dicts, with the same shapes."""
    if not isinstance(expected, dict):
        actual, expected = dict(enumerate(actual)), dict(enumerate(expected))
    assert actual.keys() == expected.keys()
    for name in expected:
        a, b = to_numpy([actual[name], expected[name]])
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype or rtol, name
        np.testing.assert_allclose(
            np.float64(a), np.float64(b), rtol, atol, err_msg=str(name)
        )


def assert_near(actual, expected, tolerance=1e-6):
    """Relative to each number, and to one."""
    assert_close(actual, expected, tolerance, tolerance)


def assert_same(actual, expected):
    """In every bit of the numbers, and in the dtypes."""
    assert_close(actual, expected, 0.0)


def assert_differ(actual, expected, least=0.0):
    """Somewhere by more than `least`."""
    pairs = zip(to_numpy(actual), to_numpy(expected), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs if a.size) > least


@contextmanager
def refused(variables, message, error=ValueError):
    """What runs within must raise an error, and leave the variables alone."""
    before = to_numpy(variables)
    with pytest.raises(error, match=message) as raised:
        yield raised
    assert_same(variables, before)
