"""What a step is applied to, and what it computes from that.

One variable, a group that shares an accumulator, and many small variables whose
state is kept together: to the step, all of them are units of the same kind. The
fields are places in memory (see `state.storage`), or the values read there.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_blockwise.algorithm.blocks import reshape
from keras_blockwise.algorithm.blocks import split
from keras_blockwise.algorithm.blocks import spread
from keras_blockwise.algorithm.eight_bits import Encoding
from keras_blockwise.algorithm.second_moment import Tensors
from keras_blockwise.blocking.partition import Matrices
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape

Tensor = Any


class Group(NamedTuple):
    """Variables that share one accumulator; most often a single one.

    Args:
        positions: Where their gradients are in the list of gradients.
        partitions: Their blocks.
    """

    positions: tuple[int, ...]
    partitions: tuple[Partition, ...]

    @property
    def accumulator_shape(self) -> Shape:
        return self.partitions[0].accumulator_shape

    @property
    def has_blocks(self) -> bool:
        return self.partitions[0].block_shape is not None


class Accumulators(NamedTuple):
    """Accumulators that are kept together: a vector, if there are several.

    Args:
        dtype: What is computed in: float32 or wider, since in bfloat16 a
            `beta_2` of 0.999 is 1.
        groups: What each is an accumulator of.
        statistics: The statistics of all of them, in the order of the rule.
            None for a variable without blocks, whose second moment is 1.
    """

    dtype: str
    groups: tuple[Group, ...]
    statistics: tuple[Any, ...]


class Weights(NamedTuple):
    """Variables whose momentum is kept together, as one vector if several.

    Args:
        dtype: As in `Accumulators`.
        variable_of: The number of the variable, among all of the optimizer; of
            each entry if there are several.
        positions: Where their gradients are in the list of gradients.
        partitions: Their blocks.
        weight_decay: Their decoupled weight decay, of each entry if it differs.
        rate: A factor of their learning rate, of each entry if it differs.
        variables: The variables; their values are joined.
        momentum: Their momentum; empty if the rule has none.
        encoding: How it is kept, if not as numbers.
    """

    dtype: str
    variable_of: int | np.ndarray
    positions: tuple[int, ...]
    partitions: tuple[Partition, ...]
    weight_decay: float | np.ndarray
    rate: float | np.ndarray
    variables: tuple[Any, ...]
    momentum: tuple[Any, ...]
    encoding: Encoding | None = None


class MatrixWeights(NamedTuple):
    """Variables with matrices of one shape, each with a state of its own.

    Args:
        dtype: As in `Accumulators`.
        variable_of: The number of each, among all of the optimizer.
        partition: The blocks of each.
        matrices: The matrices in each.
        positions: As in `Weights`.
        weight_decay: The decoupled weight decay of each.
        variables: The variables.
        momentum: The momentum of each, a tuple that may be empty.
        statistics: The statistics of each, in the order of the rule; none
            without blocks.
        turns: In which steps of a round each is drawn; nothing for all.
    """

    dtype: str
    variable_of: tuple[int, ...]
    partition: Partition
    matrices: Matrices
    positions: tuple[int, ...]
    weight_decay: tuple[float, ...]
    variables: tuple[Any, ...]
    momentum: tuple[tuple[Any, ...], ...]
    statistics: tuple[tuple[Any, ...], ...]
    turns: tuple[np.ndarray, ...] = ()


class Batch(NamedTuple):
    """The variables of a step, with all of their state.

    Those in `matrices` are in neither of the other lists.
    """

    accumulators: list[Accumulators]
    weights: list[Weights]
    matrices: list[MatrixWeights]


class BlockUpdate(NamedTuple):
    """What is computed once per block.

    Args:
        function: `(means, *statistics) -> (step_size, *new_statistics)`.
        averaged: `(g, *momentum) -> means`, if every entry of `g` is a block.
        groups: As in `Accumulators`.
        means: The means over each block.
        statistics: The values before the step.
    """

    function: Callable[..., Tensors]
    averaged: Callable[..., Tensors]
    groups: tuple[Group, ...]
    means: Tensors
    statistics: Tensors

    def by_position(self, step_size: Tensor) -> dict[int, Tensor]:
        """The step sizes of each variable, by the position of its gradient."""
        return by_position(self.groups, step_size)


def by_position(groups: Sequence[Group], values: Tensor) -> dict[int, Tensor]:
    """Values of the blocks of each variable, by the position of its gradient.

    Args:
        groups: As in `Accumulators`.
        values: One per block of each of them, joined.
    """
    shapes = [group.accumulator_shape for group in groups]
    return {
        position: value
        for group, value in zip(groups, split(values, shapes))
        for position in group.positions
    }


class EntryUpdate(NamedTuple):
    """What is computed once per entry, of all entries or of some of them.

    Args:
        function: `(step_size, gradient, *values) -> new_values`.
        dtype: As in `Weights`.
        positions: As in `Weights`.
        partitions: As in `Weights`.
        gradient: The gradients, joined.
        values: Weights, and momentum if the rule has one, before the step.
        momentum_of_gradient: Whether the new momentum needs no step size.
        encoding: As in `Weights`.
    """

    function: Callable[..., Tensors]
    dtype: str
    positions: tuple[int, ...]
    partitions: tuple[Partition, ...]
    gradient: Tensor
    values: Tensors
    momentum_of_gradient: bool
    encoding: Encoding | None

    def arguments(self, step_sizes: dict[int, Tensor]) -> Tensors:
        """Those of `function`, in shapes that broadcast to each other."""
        shape, step_size = spread(
            [step_sizes[p] for p in self.positions], self.partitions
        )
        entries = (self.gradient, *self.values)
        return step_size, *(reshape(x, shape) for x in entries)
