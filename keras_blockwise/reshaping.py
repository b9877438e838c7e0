"""Reshaping that costs nothing where there is nothing to do."""

from collections.abc import Sequence
from typing import Any

from keras import ops

Tensor = Any


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`keras.ops.reshape`, which makes an operation for any shape."""
    shape = tuple(shape)
    return x if tuple(x.shape) == shape else ops.reshape(x, shape)
