"""Reshaping and joining that cost nothing where there is nothing to do."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_blockwise.blocking.partition import Shape

Tensor = Any


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`keras.ops.reshape`, which makes an operation for any shape."""
    shape = tuple(shape)
    return x if tuple(x.shape) == shape else ops.reshape(x, shape)


def join(xs: Sequence[Tensor]) -> Tensor:
    """The numbers of several tensors as a vector; a single one as it is."""
    if len(xs) == 1:
        return xs[0]
    return ops.concatenate([reshape(x, (math.prod(x.shape),)) for x in xs])


def take_apart(x: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The tensors of these shapes that were joined, or a single one."""
    pieces = [x]
    if len(shapes) > 1:
        ends = itertools.accumulate(math.prod(shape) for shape in shapes)
        pieces = ops.split(x, list(ends)[:-1])
    return [reshape(piece, shape) for piece, shape in zip(pieces, shapes)]
