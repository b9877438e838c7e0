"""Means over the blocks of a variable, and their values spread back to it."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape

Tensor = Any


def block_mean(
    sums: Sequence[Tensor], partitions: Sequence[Partition]
) -> Tensor:
    """Mean over each block; variables that share blocks count by their size.

    Args:
        sums: `block_sum` of each variable.
        partitions: The blocks of each variable.
    """
    return sum(sums) / max(sum(p.block_size for p in partitions), 1)


def block_sum(x: Tensor, p: Partition) -> Tensor:
    """Sum over each block, of shape `accumulator_shape`."""
    if p.group is not None:
        return ops.sum(x)
    if has_whole_tiles(p):
        # Devices may have parts of any axis: a reshape would gather them.
        axes = tuple(i for i, n in enumerate(p.tile) if n > 1)
        return ops.sum(x, axis=axes, keepdims=True) if axes else x
    total = ops.sum(reshape(x, p.view_shape), axis=p.view_axes)
    return reshape(total, p.accumulator_shape)


def has_whole_tiles(p: Partition) -> bool:
    """Whether each axis is all of a block or has one entry of it."""
    return all(tile in (1, n) for n, tile in zip(p.shape, p.tile))


def spread(
    values: Sequence[Tensor], partitions: Sequence[Partition]
) -> tuple[Shape, Tensor]:
    """Values of blocks, in a shape that broadcasts to that of the entries.

    Args:
        values: One tensor of shape `accumulator_shape` per variable.
        partitions: The blocks of each variable.

    Returns:
        The shape to give the variable, or all of several joined, and the
        values. These are reshaped also where they have that shape: if their
        division stood next to a product, TensorFlow might reorder the two, on
        one replica and not on another.
    """
    if len(partitions) > 1:
        value, size = join(values), sum(math.prod(p.shape) for p in partitions)
        if value.shape[0] < size:
            value = ops.take(value, joined_blocks(partitions))
        return (size,), ops.reshape(value, (size,))
    (value,), (p,) = values, partitions
    if p.group is not None:
        return p.shape, ops.reshape(value, (1,) * len(p.shape))
    if len(p.view_shape) > 5:  # TensorFlow broadcasts no higher without XLA.
        for axis, n in enumerate(p.tile):
            value = ops.repeat(value, n, axis=axis)
        return p.shape, value
    if has_whole_tiles(p):
        return p.shape, ops.reshape(value, p.grid)
    return p.view_shape, ops.reshape(value, p.view_grid)


def joined_blocks(partitions: Sequence[Partition]) -> np.ndarray:
    """The number of the block of each entry of variables in a row."""
    ends = itertools.accumulate(math.prod(p.grid) for p in partitions)
    return np.concatenate(
        [p.blocks.ravel() + start for p, start in zip(partitions, [0, *ends])]
    )


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`keras.ops.reshape`, but no operation where there is nothing to do."""
    shape = tuple(shape)
    return x if tuple(x.shape) == shape else ops.reshape(x, shape)


def join(xs: Sequence[Tensor]) -> Tensor:
    """The entries of several tensors as a vector; a single one as it is."""
    if len(xs) == 1:
        return xs[0]
    return ops.concatenate([reshape(x, (math.prod(x.shape),)) for x in xs])


def split(x: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The inverse of `join`."""
    pieces = [x]
    if len(shapes) > 1:
        ends = itertools.accumulate(math.prod(shape) for shape in shapes)
        pieces = ops.split(x, list(ends)[:-1])
    return [reshape(piece, shape) for piece, shape in zip(pieces, shapes)]
