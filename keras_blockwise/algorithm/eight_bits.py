"""Numbers in 8 bits: codes in [-127, 127], and a scale for each group of them.

A group is at most 256 neighbours within a block. Its scale is its largest
absolute value / 127, so that no number is too large for a code, and a number is
its code times the scale. One between two codes is rounded as `rounding` says.
(Dettmers et al. 2021, arXiv:2110.02861, have groups of 256, too, and a table of
unevenly spaced values instead of codes.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_blockwise.algorithm.blocks import reshape
from keras_blockwise.algorithm.rounding import NEAREST
from keras_blockwise.algorithm.rounding import UNIT
from keras_blockwise.algorithm.rounding import drawn
from keras_blockwise.algorithm.rounding import nearest
from keras_blockwise.algorithm.rounding import rounded
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape

Tensor = Any

LARGEST = 256
# Groups of equal size may have as few entries; else the last one is shorter.
SMALLEST = 128
# The largest code.
MOST = 127
# So that an error of a product does not make it larger.
BELOW_MOST = MOST * (1.0 - 2.0**-20)
# In a group without larger numbers, all are zero: 1 / TINY is still finite.
TINY = 2.0**-100


@dataclass(frozen=True)
class Groups:
    """The groups of a variable.

    Args:
        shape: Shape of the variable.
        view: A reshape of it, as `Partition.view_shape`.
        axis: The axis of `view` along which entries are neighbours.
        size: How many entries a group has; the last one may have fewer.

    Example:

    >>> groups = Groups.of(Partition((3, 3, 64, 10), (3, 3, 64, 1)))
    >>> groups.view, groups.size, groups.scale_shape
    ((576, 10), 192, (3, 10))
    """

    shape: Shape
    view: Shape
    axis: int
    size: int

    @classmethod
    def of(cls, partition: Partition) -> "Groups":
        """Groups along the longest axis inside blocks, of more than one entry.

        Args:
            partition: The blocks, which have more than one entry.
        """
        view = partition.view_shape
        axis = max(partition.view_axes, key=lambda i: view[i])
        n = view[axis]
        sizes = (k for k in range(LARGEST, SMALLEST - 1, -1) if n % k == 0)
        size = n if n <= LARGEST else next(sizes, LARGEST)
        return cls(partition.shape, view, axis, size)

    @property
    def count(self) -> int:
        """How many groups are along the axis."""
        return -(-self.view[self.axis] // self.size)

    @property
    def scale_shape(self) -> Shape:
        """One scale per group."""
        return self._with(self.count)

    @property
    def width(self) -> int:
        """How far apart the entries of a group are."""
        return math.prod(self.view[self.axis + 1 :])

    @property
    def stretches(self) -> int:
        """How many stretches of `width` whole groups there are."""
        return math.prod(self.view[: self.axis]) * self.count

    def _with(self, *sizes: int) -> Shape:
        """The view, with these sizes instead of that of the axis."""
        before, after = self.view[: self.axis], self.view[self.axis + 1 :]
        return (*before, *sizes, *after)

    def cut(self, x: Tensor) -> Tensor:
        """The entries of each group along the axis after `axis`."""
        x = reshape(x, self.view)
        missing = self.count * self.size - self.view[self.axis]
        if missing:
            pads = [(0, 0)] * len(self.view)
            pads[self.axis] = (0, missing)
            x = ops.pad(x, pads)
        return reshape(x, self._with(self.count, self.size))

    def spread(self, values: Tensor) -> Tensor:
        """The value of its group for each entry of the variable.

        Args:
            values: Tensor of the shape `scale_shape`.
        """
        n = self.view[self.axis]
        if n % self.size:
            group_of = np.arange(n) // self.size
            return reshape(ops.take(values, group_of, self.axis), self.shape)
        values = ops.reshape(values, self._with(self.count, 1))
        spread = ops.broadcast_to(values, self._with(self.count, self.size))
        return reshape(spread, self.shape)

    def of_row(self, shape: Shape) -> "Groups":
        """The groups of a row: of entries in a row that have whole ones.

        Args:
            shape: Shape of the row.
        """
        after = self.view[self.axis + 1 :]
        n = math.prod(shape) // self.width
        return Groups(shape, (n, *after), 0, self.size)


def saves_memory(partition: Partition, item_size: int) -> bool:
    """Whether 8 bits take less than numbers of `item_size` bytes."""
    if not partition.view_axes or 0 in partition.shape:
        return False
    groups = Groups.of(partition)
    size, count = math.prod(groups.shape), math.prod(groups.scale_shape)
    return size + 4 * count < item_size * size


def largest_of(x: Tensor, groups: Groups) -> Tensor:
    """The largest absolute value of each group, of shape `scale_shape`."""
    return ops.max(ops.abs(groups.cut(x)), axis=groups.axis + 1)


class Encoding(NamedTuple):
    """How a tensor is kept.

    Args:
        groups: Its groups.
        seeds: What decides between two codes, as in `rounding`; without them,
            it is the nearest one.
        kept: The codes and scales before the step.
    """

    groups: Groups
    seeds: tuple[Tensor, ...] = ()
    kept: tuple[Tensor, ...] = ()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes, as int8, and the scales, as float32.

        Args:
            x: Tensor of the shape of the variable, or of a reshape.
        """
        largest = largest_of(x, self.groups)
        return self.codes(x, factors(largest)), scales(largest)

    def codes(
        self,
        x: Tensor,
        factors: Tensor,
        nearest: Callable[[Tensor], Tensor] = nearest,
    ) -> Tensor:
        """The codes, as int8.

        Args:
            x: As in `encode`.
            factors: What `factors` returns of the largest values of `x`.
            nearest: As in `rounded`, of numbers below 2^22.
        """
        x = reshape(ops.cast(x, "float32"), self.groups.shape)
        noise = drawn(*self.seeds) if self.seeds else NEAREST
        x = x * self.groups.spread(factors)
        return ops.cast(rounded(x, noise, nearest), "int8")


def factors(largest: Tensor) -> Tensor:
    """What the numbers of each group are multiplied with, to be rounded.

    Args:
        largest: The largest absolute value of each group.
    """
    return BELOW_MOST * UNIT / at_least_tiny(largest)


def scales(largest: Tensor) -> Tensor:
    """The scale of each group, as float32, by its largest absolute value."""
    return at_least_tiny(largest) / MOST


def at_least_tiny(largest: Tensor) -> Tensor:
    return ops.maximum(ops.cast(largest, "float32"), TINY)


def decode(codes: Tensor, scales: Tensor, groups: Groups) -> Tensor:
    """What was encoded, as float32."""
    return ops.cast(codes, "float32") * groups.spread(scales)
