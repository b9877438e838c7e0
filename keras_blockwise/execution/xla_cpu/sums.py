"""Sums over blocks: partial sums, which XLA makes fast on a CPU.

XLA's code for a CPU adds one number after the other unless a sum has at most 32
terms, of which it computes several neighbouring ones at once. So a sum is made
of partial sums of at most 32 terms; those of a row are added up by the product
of a matrix with a vector of ones.

Sums of squares in GB/s of float32 read, on two cores of an EPYC, by
`python -m benchmarks.sums`:

    shape               summed over   plain   in parts
    (768, 3072)         everything      1.4       14.2
    (3, 3, 256, 256)    everything      1.6       16.6
    (7, 7, 3, 64)       everything      0.9        2.3
    (768, 3072)         columns         1.9       13.3
    (2048, 1000)        columns         1.6       13.8
    (1733, 997)         columns         1.5       13.7
    (3, 3, 512, 512)    columns         1.1       11.9
    (3, 3, 3, 64, 64)   columns         3.6        8.5
    (8192, 768)         rows            1.5       17.0
    (65536, 64)         rows            1.6        9.7

Other forms lost: a product of the whole gradient with ones takes as much memory
as the gradient, adding up slices takes longer to compile and to run, and of
three stages XLA fuses the last two, which is ten times slower than a plain sum.
"""

import math
from typing import Any

from keras import ops

from keras_blockwise.algorithm.blocks import reshape
from keras_blockwise.algorithm.eight_bits import Groups
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.execution.xla_cpu.barriers import after
from keras_blockwise.execution.xla_cpu.barriers import materialize
from keras_blockwise.state.storage import SMALL

Tensor = Any

# Most terms of a sum for which XLA emits vectorized code.
MOST_TERMS = 32
# Of so many numbers, XLA computes the largest without a loop, in the pass that
# makes them: of numbers apart, and of neighbours. Of more, not in every shape.
COMPARED = 4
NEIGHBOURS_COMPARED = 8
# How many neighbouring sums that code computes at once.
LANES = 8
# Preferred distance between the terms of one sum, in numbers.
DISTANCE = 1024


def read_along(g: Tensor, w: Tensor, p: Partition) -> Tensor:
    """The gradient, made to depend on `w`, so that XLA schedules both together.

    XLA would first compute what depends on the gradients alone: the sums of all
    of them, and then all momenta, when the gradients have left the cache.
    """
    if p.block_size == 1 or math.prod(g.shape) <= SMALL:
        return g
    return after(w, g)


def block_sum(x: Tensor, p: Partition) -> Tensor:
    """Sum over each block, of shape `accumulator_shape`."""
    size = math.prod(p.shape)
    shape, axes = p.view_shape, p.view_axes
    if p.group is not None:
        shape, axes = (size,), (0,)
    x = reshape(x, shape)
    if not axes:
        total = x
    elif size < SMALL:
        total = ops.sum(x, axis=axes)
    elif len(shape) == 2 and axes == (1,) and row_terms(shape[1]) > 1:
        total = row_sums(x)
    else:
        axis = max(axes, key=lambda axis: shape[axis])
        parts = partial_sums(x, axis)
        total = sum(ops.sum(part, axis=axes) for part in parts)
    return reshape(total, p.accumulator_shape)


def largest_of(x: Tensor, groups: Groups) -> Tensor:
    """As in `eight_bits`. Of few terms, XLA computes what it compares."""
    n = groups.size
    most = min(n, NEIGHBOURS_COMPARED if groups.width == 1 else COMPARED)
    terms = next((k for k in range(most, most // 2, -1) if n % k == 0), most)
    return largest_of_parts(largest_in_parts(x, groups, terms), groups)


def largest_in_parts(x: Tensor, groups: Groups, terms: int) -> Tensor:
    """The largest absolute values of so many entries each, in each group."""
    before, after = axes_of_parts(groups, terms)
    width = groups.width
    x = reshape(groups.cut(ops.abs(x)), (-1, groups.size * width))
    x = ops.pad(x, ((0, 0), (0, -groups.size % terms * width)))
    x = reshape(x, (*before, terms, *after))
    return materialize(ops.max(x, axis=len(before)))


def axes_of_parts(groups: Groups, terms: int) -> tuple[list[int], list[int]]:
    """The axes before that of the terms, and those after it.

    Without axes of one entry, for which XLA would write all of it to memory.
    """
    before = [groups.stretches]
    after = [-(-groups.size // terms), groups.width]
    return [n for n in before if n > 1], [n for n in after if n > 1]


def largest_of_parts(parts: Tensor, groups: Groups) -> Tensor:
    """The largest of each group, by what `largest_in_parts` returns."""
    parts = reshape(parts, (groups.stretches, -1, groups.width))
    return reshape(ops.max(parts, axis=1), groups.scale_shape)


def row_sums(x: Tensor) -> Tensor:
    """The sum of each row of a matrix."""
    rows, n = x.shape
    terms = row_terms(n)
    x = ops.sum(reshape(x, (rows, terms, n // terms)), axis=1)
    return ops.matmul(x, ops.ones((n // terms,), x.dtype))


def row_terms(n: int) -> int:
    """How many terms a partial sum of a row of `n` numbers has."""
    most = min(MOST_TERMS, n // LANES)
    return max((k for k in range(1, most + 1) if n % k == 0), default=1)


def partial_sums(x: Tensor, axis: int) -> list[Tensor]:
    """Tensors that have, all together, the sums of `x` along an axis."""
    before, n, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    width = math.prod(after)
    terms, distance = terms_and_distance(n, width)
    if terms == 1:
        return [x]
    count = n // (terms * distance)
    used = count * terms * distance
    x = reshape(x, (*before, n, width))
    even = x if used == n else x[..., :used, :]
    sums = reshape(even, (*before, count, terms, distance * width))
    sums = materialize(ops.sum(sums, axis=axis + 1))
    parts = [reshape(sums, (*before, count * distance, *after))]
    if used < n:
        parts.append(reshape(x[..., used:, :], (*before, n - used, *after)))
    return parts


def terms_and_distance(n: int, width: int) -> tuple[int, int]:
    """How many of `n` rows a partial sum adds, and how far apart they are.

    So that few rows are left over, and so many sums that XLA does not fuse the
    sum of these with them.
    """
    most = min(MOST_TERMS, n // (MOST_TERMS + LANES))
    if most < 2:
        return 1, 1
    if width <= 2 * LANES:
        return most, -(-LANES // width)
    # Powers of two: with others, XLA divides to find a number in 5 axes.
    exponent = max(DISTANCE // width, 1).bit_length() - 1
    for terms in range(most, most // 2, -1):
        for distance in (2**i for i in range(exponent, -1, -1)):
            if n % (terms * distance) == 0:
                return terms, distance
    return most, 1
