"""Reads the variables, takes the step, and writes the result."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from keras_blockwise.algorithm.blocks import join
from keras_blockwise.algorithm.blocks import split
from keras_blockwise.algorithm.rule import Kernels
from keras_blockwise.algorithm.rule import Rule
from keras_blockwise.algorithm.step import step
from keras_blockwise.algorithm.units import Batch
from keras_blockwise.algorithm.units import MatrixWeights
from keras_blockwise.state.storage import EncodedPart
from keras_blockwise.state.storage import Part

Tensor = Any
Variable = Any
Read = Callable[[Variable], Tensor]
Assign = Callable[[Variable, Tensor], None]


def update(
    rule: Rule,
    batch: Batch,
    gradients: Sequence[Tensor],
    learning_rate: Tensor,
    iterations: Tensor,
    multipliers: Tensor | None = None,
    *,
    kernels: Kernels,
    read: Read,
    assign: Assign,
    skip_nonfinite: bool,
) -> Tensor:
    """Updates variables, and the state that belongs to them, in place.

    Args:
        rule: The optimizer.
        batch: The variables, and where their state is.
        gradients: One dense tensor per variable.
        learning_rate: Scalar.
        iterations: Scalar, 0 on the first step.
        multipliers: As in `step`.
        kernels: As in `step`.
        read: What a variable is now.
        assign: Gives a variable a new value.
        skip_nonfinite: As in `step`.

    Returns:
        Whether the step was taken: a boolean scalar.
    """
    statistics, entries, matrices, taken = step(
        rule,
        values_of(batch, read, iterations),
        gradients,
        learning_rate,
        iterations,
        kernels,
        skip_nonfinite,
        multipliers,
    )

    def write(part: Part | EncodedPart, *values: Tensor) -> None:
        part.write(values, taken, read, assign)

    for accumulators, new in zip(batch.accumulators, statistics):
        for part, value in zip(accumulators.statistics, new):
            write(part, value)
    for weights, (w, *new) in zip(batch.weights, entries):
        shapes = [partition.shape for partition in weights.partitions]
        for variable, value in zip(weights.variables, split(w, shapes)):
            assign(variable, value)
        for part in weights.momentum:
            write(part, *new)
    for unit, updates in zip(batch.matrices, matrices):
        for i, (new, (w, *momentum)) in enumerate(updates):
            assign(unit.variables[i], w)
            for part, value in zip(unit.statistics[i], new, strict=True):
                write(part, value)
            for part, value in zip(unit.momentum[i], momentum, strict=True):
                encoding = part.encoding(read, iterations)
                kept = encoding.encode(value) if encoding else (value,)
                write(part, *kept)
    return taken


def values_of(batch: Batch, read: Read, iterations: Tensor) -> Batch:
    """The values of all variables, read in the order in which to use them."""
    unit_at = {
        position: k
        for k, unit in enumerate(batch.accumulators)
        for group in unit.groups
        for position in group.positions
    }
    accumulators = {}
    weights = []
    for unit in batch.weights:
        for k in dict.fromkeys(unit_at[p] for p in unit.positions):
            if k not in accumulators:
                own = batch.accumulators[k]
                values = tuple(part.value(read) for part in own.statistics)
                accumulators[k] = own._replace(statistics=values)
        w = join([read(variable) for variable in unit.variables])
        momentum = tuple(part.value(read) for part in unit.momentum)
        encoding = None
        if unit.momentum:
            encoding = unit.momentum[0].encoding(read, iterations)
        weights.append(
            unit._replace(variables=(w,), momentum=momentum, encoding=encoding)
        )
    return Batch(
        [accumulators[k] for k in sorted(accumulators)],
        weights,
        [values_of_matrices(unit, read) for unit in batch.matrices],
    )


def values_of_matrices(unit: MatrixWeights, read: Read) -> MatrixWeights:
    def values(parts: Sequence[Part]) -> tuple[Tensor, ...]:
        return tuple(part.value(read) for part in parts)

    return unit._replace(
        variables=tuple(map(read, unit.variables)),
        momentum=tuple(map(values, unit.momentum)),
        statistics=tuple(map(values, unit.statistics)),
    )
