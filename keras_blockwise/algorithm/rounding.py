"""Stochastic rounding: up or down at random, and right on average.

Rounding to nearest loses every change of less than half a unit, in each step
anew. Here the integer part of `x + u` is taken, with `u` uniform in [0, 1), and
`x` to 15 binary places.

The numbers come from a counter-based generator (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"): `u` is a function of the step, the
variable and the entry, with no state. So they are the same on every replica,
in a job that goes on from a file, and on every backend.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_blockwise.blocking.partition import Shape

Tensor = Any

# Of `lowbias32` (Wellons, Hash Prospector): shifts, and factors as int32.
SHIFTS = (16, 15, 16)
FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)
# How finely a number is cut, and `u` drawn: 2^-15.
BITS = 15
UNIT = 2.0**BITS
# Instead of a random number, to round to the nearest integer.
NEAREST = 2 ** (BITS - 1)
# Digits of a number after its first one, and the smallest distance of two (of
# bfloat16, the smallest that is computed with).
SIXTEEN_BITS = {"bfloat16": (7, 2.0**-126), "float16": (10, 2.0**-24)}
# What numbers are drawn for: an entry has one of each.
MOMENTUM, WEIGHT = range(2)


def nearest(x: Tensor) -> Tensor:
    """The nearest integers, as int32."""
    return ops.cast(ops.round(x), "int32")


def rounded(
    x: Tensor, noise: Tensor, nearest: Callable[[Tensor], Tensor] = nearest
) -> Tensor:
    """One of the two integers next to each number, as int32.

    Args:
        x: Tensor, `UNIT` times numbers below 2^15.
        noise: What `random_numbers` returns, or `NEAREST`.
        nearest: As `nearest`, for a device.
    """
    return ops.right_shift(nearest(x) + noise, BITS)


def rounded_to(dtype: str, x: Tensor, noise: Tensor) -> Tensor:
    """One of the two numbers of a dtype of 16 bits next to each, as float32.

    Args:
        dtype: `"bfloat16"` or `"float16"`.
        x: Tensor of float32.
        noise: As in `rounded`.
    """
    digits, smallest = SIXTEEN_BITS[dtype]
    size = ops.abs(x)
    # The distance to the next float32: the product is 0.75 to 1.5 of it.
    step = size + size * (1.5 * 2.0**-24) - size
    unit = ops.maximum(step * 2.0 ** (23 - digits), smallest)
    return ops.cast(rounded(x / unit * UNIT, noise), "float32") * unit


def random_numbers(
    iterations: Tensor,
    variable: int | np.ndarray,
    shape: Shape,
    purpose: int = MOMENTUM,
) -> Tensor:
    """Integers in [0, 2^15), as int32.

    Args:
        iterations: Scalar, the count of steps.
        variable: The number of the variable, or that of each entry.
        shape: Their shape.
        purpose: `MOMENTUM` or `WEIGHT`.
    """
    return ops.reshape(
        drawn(*seeds(iterations, variable, shape, purpose)), shape
    )


def seeds(
    iterations: Tensor,
    variable: int | np.ndarray,
    shape: Shape,
    purpose: int = MOMENTUM,
) -> tuple[Tensor, Tensor]:
    """What numbers are drawn from: one for each row, and one for each column.

    A compiler keeps in memory what is constant, so not one for each entry.
    They broadcast to the shape, of rank 1 at least.

    Args:
        iterations: As in `random_numbers`, like the others.
    """
    step = mixed(ops.cast(iterations, "int32"))
    stream = 2 * np.asarray(variable, np.int32) + np.int32(purpose)
    key = mixed(ops.bitwise_xor(step, ops.convert_to_tensor(stream, "int32")))
    if stream.ndim:
        key = ops.reshape(key, shape)
    *rows, n = shape or (1,)
    row = mixed(-1 - ops.arange(math.prod(rows), dtype="int32"))
    column = ops.reshape(
        mixed(ops.arange(n, dtype="int32")), [1] * len(rows) + [n]
    )
    return ops.reshape(row, (*rows, 1)), ops.bitwise_xor(column, key)


def drawn(row: Tensor, column: Tensor) -> Tensor:
    """The random numbers of these rows and columns, of `seeds`."""
    numbers = ops.bitwise_xor(row, column)
    # The high bits of the product depend on all bits.
    return shifted(numbers * FACTORS[0], 32 - BITS)


def mixed(x: Tensor) -> Tensor:
    """A permutation of the int32 numbers that looks random."""
    x = ops.bitwise_xor(x, shifted(x, SHIFTS[0]))
    for factor, shift in zip(FACTORS, SHIFTS[1:]):
        x = x * factor
        x = ops.bitwise_xor(x, shifted(x, shift))
    return x


def shifted(x: Tensor, shift: int) -> Tensor:
    """To the right, as if there were no sign."""
    # Of its own, Keras may make a float of an integer.
    mask = ops.convert_to_tensor(2 ** (32 - shift) - 1, "int32")
    return ops.bitwise_and(ops.right_shift(x, shift), mask)
