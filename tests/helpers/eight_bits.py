"""What a momentum in 8 bits is, and the random numbers, without the package."""

import numpy as np

from keras_blockwise.algorithm.eight_bits import Groups


def hashed(x):
    """Wellons's lowbias32, of uint32."""
    x = np.uint32(x)
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def random_numbers(step, variable, shape, purpose=0):
    """In [0, 1), of step 0, 1, ..."""
    with np.errstate(over="ignore"):
        key = hashed(hashed(step) ^ np.uint32(2 * variable + purpose))
        row, column = np.divmod(np.arange(np.prod(shape)), shape[-1])
        row = hashed(np.uint32(2**32 - 1) - np.uint32(row))
        x = (row ^ hashed(column) ^ key) * np.uint32(0x7FEB352D)
    return (x >> np.uint32(17)).reshape(shape) / 2**15


def stored(m, number, partition, step):
    """Momentum 0, 1, ... after it has been encoded in a step, and decoded.

    The groups of small variables: the entries of a block along an axis.
    """
    groups = Groups.of(partition)
    u = random_numbers(step, number, partition.shape)
    x, u = (np.reshape(a, groups.view) for a in (m, u))
    largest = np.abs(x).max(groups.axis, keepdims=True)
    scale = np.maximum(largest, 2.0**-100) / 127
    codes = np.floor(x / scale * (1 - 2.0**-20) + u)
    return (codes * scale).reshape(partition.shape)
