"""The step sizes of the last step, from the statistics that it has left."""

import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from keras import ops

from keras_blockwise.algorithm.blocks import reshape
from keras_blockwise.algorithm.rule import Rule
from keras_blockwise.algorithm.rule import Scalars
from keras_blockwise.algorithm.second_moment import Tensors
from keras_blockwise.algorithm.step import step_size_of
from keras_blockwise.algorithm.units import Accumulators
from keras_blockwise.algorithm.units import Batch
from keras_blockwise.algorithm.units import MatrixWeights
from keras_blockwise.algorithm.units import by_position

Tensor = Any


class StepSizes(NamedTuple):
    """Of the blocks of one variable.

    Args:
        values: The step size of each. Without blocks, a scalar: the learning
            rate. NaN if no second moment is kept. Of a matrix whose function is
            taken, they stand in the ratio that the function gives them, and
            their mean is the learning rate. Of second moments that are
            matrices, those of the diagonals, one for each entry.
        at_floor: Whether epsilon makes the step size of each: the root is no
            more than twice that of a second moment of 0. NaN if there is none.
    """

    values: Tensor
    at_floor: Tensor


def step_sizes(
    rule: Rule,
    batch: Batch,
    read: Callable[[Any], Tensor],
    learning_rate: Tensor,
    t: Tensor,
    multipliers: Tensor | None,
) -> dict[int, StepSizes]:
    """The step sizes of some variables, by the positions of their gradients.

    Args:
        rule: The optimizer.
        batch: The variables, and where their state is.
        read: What is there now.
        learning_rate: Scalar.
        t: Scalar, 1 after the first step.
        multipliers: A factor of the learning rate for each position; `None`
            for 1.
    """

    def at(dtype: str) -> Scalars:
        return Scalars.of(
            rule, ops.cast(t, dtype), ops.cast(learning_rate, dtype), t
        )

    found: dict[int, StepSizes] = {}
    for unit in batch.accumulators:
        found |= of_accumulators(rule, at(unit.dtype), unit, read)
    for own in batch.matrices:
        found |= of_matrices(rule, at(own.dtype), own, read)
    if multipliers is not None:
        for position, (values, at_floor) in found.items():
            factor = ops.cast(multipliers[position], values.dtype)
            found[position] = StepSizes(factor * values, at_floor)
    return found


def of_accumulators(
    rule: Rule, at: Scalars, unit: Accumulators, read: Callable[[Any], Tensor]
) -> dict[int, StepSizes]:
    if not unit.statistics:
        nan = at.learning_rate * math.nan
        factor = math.nan if unit.groups[0].has_blocks else rule.plain_factor
        sizes = StepSizes(at.learning_rate * factor, nan)
        return {p: sizes for group in unit.groups for p in group.positions}
    values, at_floor = of_statistics(
        rule, at, tuple(map(read, unit.statistics))
    )
    if rule.rate_last:
        values = at.learning_rate * values
    floors = by_position(unit.groups, at_floor)
    return {
        position: StepSizes(value, floors[position])
        for position, value in by_position(unit.groups, values).items()
    }


def of_matrices(
    rule: Rule, at: Scalars, unit: MatrixWeights, read: Callable[[Any], Tensor]
) -> dict[int, StepSizes]:
    found = {}
    for position, parts in zip(unit.positions, unit.statistics):
        if not parts:
            nan = at.learning_rate * math.nan
            found[position] = StepSizes(at.learning_rate, nan)
            continue
        shape = rule.statistic_shape(unit.partition)
        statistics = tuple(reshape(read(part), shape) for part in parts)
        if rule.matrix_moments is not None:
            statistics = tuple(map(diagonal_of_last, statistics))
        values, at_floor = of_statistics(rule, at, statistics)
        if rule.matrix_function is not None:
            values = values / ops.mean(values)
        found[position] = StepSizes(at.learning_rate * values, at_floor)
    return found


def diagonal_of_last(v: Tensor) -> Tensor:
    return ops.diagonal(v, axis1=-2, axis2=-1)


def of_statistics(rule: Rule, at: Scalars, statistics: Tensors) -> StepSizes:
    """The step size of each block, and whether it is at the floor."""

    def keep(old: Tensor, mean: Tensor) -> Tensor:
        return old

    _, v = rule.second_moment.update(keep, statistics, statistics)
    root = rule.root(v, at.root_correction)
    least = rule.root(ops.zeros_like(v), at.root_correction)
    at_floor = ops.cast(root <= 2.0 * least, v.dtype)
    return StepSizes(step_size_of(rule, at, v), at_floor)
