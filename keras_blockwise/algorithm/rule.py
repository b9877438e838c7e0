"""What an optimizer is made of: the values that the step takes."""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple
from typing import Protocol

from keras import ops

from keras_blockwise.algorithm.accumulators import Accumulator
from keras_blockwise.algorithm.matrix_moments import Bounds
from keras_blockwise.algorithm.matrix_moments import MatrixMoments
from keras_blockwise.algorithm.matrix_moments import columns_of
from keras_blockwise.algorithm.momentum import Momentum
from keras_blockwise.algorithm.momentum import Update
from keras_blockwise.algorithm.orthogonal import MatrixFunction
from keras_blockwise.algorithm.second_moment import Root
from keras_blockwise.algorithm.second_moment import SecondMoment
from keras_blockwise.algorithm.second_moment import Tensors
from keras_blockwise.algorithm.spikes import Limit
from keras_blockwise.algorithm.units import BlockUpdate
from keras_blockwise.algorithm.units import EntryUpdate
from keras_blockwise.blocking.partition import Matrices
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape

Tensor = Any


@dataclass(frozen=True)
class Rule:
    """What makes the step one optimizer or another.

    Args:
        second_moment: What is averaged over a block, and kept.
        accumulator: How it is kept over time.
        root: What divides the learning rate, and where epsilon stands in it.
        momentum: Of the scaled gradient, or of the gradient.
        momentum_of_gradient: Which of both.
        limit: What entries of a gradient are cut to.
        matrix_function: Of the momentum of a hidden matrix.
        matrix_moments: Which second moments are matrices.
        bounds: Of the step sizes.
        plain_rate: Of variables without blocks, and the learning rate that it
            stands beside; `None` for the learning rate.
        stochastic_rounding: Of new weights in 16 bits.
    """

    second_moment: SecondMoment
    accumulator: Accumulator
    root: Root
    momentum: Momentum
    momentum_of_gradient: bool = False
    limit: Limit | None = None
    matrix_function: MatrixFunction | None = None
    matrix_moments: MatrixMoments | None = None
    bounds: Bounds | None = None
    plain_rate: Sequence[float] | None = None
    stochastic_rounding: bool = False

    @property
    def rate_last(self) -> bool:
        """Whether the learning rate multiplies the direction.

        The momentum, and the bounds of step sizes, are free of it then.
        """
        return any((self.matrix_function, self.matrix_moments))

    def matrices_of(
        self, partition: Partition, hidden: Matrices | None
    ) -> Matrices | None:
        """What takes a step by matrices, in a variable; `None` if nothing.

        Args:
            partition: Its blocks.
            hidden: What it is as hidden matrices.
        """
        if self.matrix_moments is not None:
            return columns_of(partition)
        return hidden if self.matrix_function is not None else None

    def statistic_shape(self, partition: Partition) -> Shape:
        """The shape of each statistic of a variable."""
        shape, n = partition.accumulator_shape, partition.block_size
        if self.matrix_moments is None or columns_of(partition) is None:
            return shape
        return (*shape, n, n)

    @property
    def plain_factor(self) -> float:
        """What multiplies the learning rate of variables without blocks."""
        if self.plain_rate is None:
            return 1.0
        rate, beside = self.plain_rate
        return rate / beside


class Scalars(NamedTuple):
    """What all blocks of step `t` share; see the formulas in `step`."""

    learning_rate: Tensor
    rate: Tensor
    decay: Tensor
    weight: Tensor
    root_correction: Tensor
    numerator: Tensor
    momentum: Update
    bounds: tuple[Tensor, Tensor] | None
    t: Tensor
    iterations: Tensor
    taken: Tensor = True

    @classmethod
    def of(
        cls,
        rule: Rule,
        t: Tensor,
        learning_rate: Tensor,
        iterations: Tensor,
        taken: Tensor = True,
    ) -> "Scalars":
        decay, weight, correction = rule.accumulator(t)
        root = correction**0.5
        rate = learning_rate
        if rule.rate_last:
            rate = ops.ones_like(learning_rate)
        return cls(
            learning_rate,
            rate,
            decay,
            weight,
            root_correction=root,
            numerator=rate * root,
            momentum=rule.momentum.at(t),
            bounds=rule.bounds and rule.bounds(t),
            t=t,
            iterations=iterations,
            taken=taken,
        )

    def if_taken(self, new: Tensors, old: Tensors) -> Tensors:
        """`new`, or `old` if the step is left out."""
        if self.taken is True:
            return new
        return tuple(ops.where(self.taken, x, y) for x, y in zip(new, old))


class Kernels(Protocol):
    """How a backend computes what takes the time of a step."""

    def block_sums(
        self,
        averaged: Callable[[Tensor], Tensors],
        g: Tensor,
        w: Tensor,
        partition: Partition,
    ) -> Tensors:
        """The sums of `averaged(g)` over each block; `w` helps to schedule."""

    def of_matrices(
        self, function: MatrixFunction, xs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The function of matrices of one shape."""

    def run(
        self, blocks: Sequence[BlockUpdate], entries: Sequence[EntryUpdate]
    ) -> tuple[Sequence[Tensors], Any]:
        """The new statistics of each unit, and the new values of each unit.

        A momentum with an `encoding` is encoded: codes and scales.
        """
