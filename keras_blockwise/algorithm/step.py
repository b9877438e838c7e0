"""THE STEP: the whole mathematics of every optimizer of this package.

For variables `w` with gradients `g`, step `t = 1, 2, ...`, and `mean_b` the
mean over a block:

    s = mean_b(g^2)
    v <- decay * v + weight * s                       accumulator(t)
    step_size = learning_rate * sqrt(correction) / root(v)
    m, direction = momentum(m, step_size * g)         momentum of the scaled g
    m, x = momentum(m, g); direction = step_size * x  or of g itself
    w <- w - learning_rate * weight_decay * w - direction

A rule with a `matrix_function` takes another step where a variable is a matrix:

    m, x = momentum(m, g); x = matrix_function(x)
    s = mean_b(x^2); v as above; x = x / root(v)
    w <- w - learning_rate * (weight_decay * w + RMS * x / sqrt(mean(x^2)))

and one with `matrix_moments` another where a block has several entries, whose
`v` is a matrix: see there.

`v` and `step_size` are numbers of a block, `m` and `w` of an entry. Without
blocks, `step_size = learning_rate`, or the root is 1. A multiplier is a factor
of the learning rate of one variable. The forms of `v` and `root` are in
`second_moment`, those of the coefficients in `accumulators` and `momentum`;
what may be cut off from g first, in `spikes`; a `rule` has one of each.
Blockwise adaptivity: Zheng & Kwok 2019, arXiv:1905.09899.
"""

import functools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from functools import partial
from typing import Any
from typing import cast

import keras
import numpy as np
from keras import ops

from keras_blockwise.algorithm.blocks import block_mean
from keras_blockwise.algorithm.blocks import join
from keras_blockwise.algorithm.blocks import reshape
from keras_blockwise.algorithm.blocks import split
from keras_blockwise.algorithm.blocks import spread
from keras_blockwise.algorithm.matrix_moments import ROUND
from keras_blockwise.algorithm.matrix_moments import accumulated
from keras_blockwise.algorithm.matrix_moments import directions
from keras_blockwise.algorithm.orthogonal import RMS
from keras_blockwise.algorithm.orthogonal import TINY
from keras_blockwise.algorithm.orthogonal import MatrixFunction
from keras_blockwise.algorithm.orthogonal import from_matrices
from keras_blockwise.algorithm.orthogonal import to_matrices
from keras_blockwise.algorithm.rounding import SIXTEEN_BITS
from keras_blockwise.algorithm.rounding import WEIGHT
from keras_blockwise.algorithm.rounding import random_numbers
from keras_blockwise.algorithm.rounding import rounded_to
from keras_blockwise.algorithm.rule import Kernels
from keras_blockwise.algorithm.rule import Rule
from keras_blockwise.algorithm.rule import Scalars
from keras_blockwise.algorithm.second_moment import Tensors
from keras_blockwise.algorithm.second_moment import squares
from keras_blockwise.algorithm.spikes import cut_spikes
from keras_blockwise.algorithm.units import Batch
from keras_blockwise.algorithm.units import BlockUpdate
from keras_blockwise.algorithm.units import EntryUpdate
from keras_blockwise.algorithm.units import MatrixWeights
from keras_blockwise.algorithm.units import Weights
from keras_blockwise.blocking.partition import Partition

Tensor = Any
# The new statistics, and the new weight and its new momentum if it has one.
MatrixUpdate = tuple[Tensors, Tensors]


def step(
    rule: Rule,
    batch: Batch,
    gradients: Sequence[Tensor],
    learning_rate: Tensor,
    iterations: Tensor,
    kernels: Kernels,
    skip_nonfinite: bool = False,
    multipliers: Tensor | None = None,
) -> tuple[Sequence[Tensors], Any, Iterator[list[MatrixUpdate]], Tensor]:
    """One step of some variables.

    Args:
        rule: The optimizer.
        batch: The values of the variables and of their state.
        gradients: One dense tensor per variable.
        learning_rate: Scalar.
        iterations: Scalar, 0 on the first step.
        kernels: How to compute sums and updates.
        skip_nonfinite: Whether to leave out a step if a gradient has an
            infinity or a NaN, or is too large to be squared.
        multipliers: A factor of the learning rate for each variable of the
            optimizer; `None` for 1.

    Returns:
        The new statistics of each of `batch.accumulators`, the new weights and
        momentum of each of `batch.weights`, what is new of each variable of
        each of `batch.matrices`, and whether the step was taken.
    """

    def time(dtype: str) -> Tensor:
        return ops.cast(iterations, dtype) + 1

    checked: list[Tensor] = []
    if rule.limit:  # It makes an infinity finite.
        checked = list(gradients)
        gradients = cut_spikes(rule.limit, time, batch.accumulators, gradients)
    of_entries = partial(averaged, rule, time)
    means = block_means(
        rule, batch, gradients, kernels, of_entries, skip_nonfinite
    )
    taken = True
    if skip_nonfinite:
        checked += [s for s, *_ in means]
        checked += sums_of_squares(batch.matrices, gradients, kernels)
        finite = [ops.all(ops.isfinite(x)) for x in checked]
        taken = ops.all(ops.stack(finite))

    @functools.cache
    def at(dtype: str) -> Scalars:
        rate = ops.cast(learning_rate, dtype)
        return Scalars.of(rule, time(dtype), rate, iterations, taken)

    blocks = [
        BlockUpdate(
            partial(
                block_step if unit.groups[0].has_blocks else plain_step,
                rule,
                at(unit.dtype),
            ),
            partial(of_entries, unit.dtype),
            unit.groups,
            unit_means,
            tuple(reshape(v, unit_means[0].shape) for v in unit.statistics),
        )
        for unit, unit_means in zip(batch.accumulators, means)
    ]
    entries = [
        entry_update(rule, at(unit.dtype), unit, gradients, multipliers)
        for unit in batch.weights
    ]
    statistics, new = kernels.run(blocks, entries) if entries else ([], [])
    matrices = (
        matrix_step(rule, at(unit.dtype), unit, gradients, kernels, multipliers)
        for unit in batch.matrices
    )
    return statistics, new, matrices, taken


def entry_update(
    rule: Rule,
    at: Scalars,
    unit: Weights,
    gradients: Sequence[Tensor],
    multipliers: Tensor | None,
) -> EntryUpdate:
    """What is computed once per entry of a unit."""
    multiplier = multiplier_of(unit.dtype, unit.variable_of, multipliers)
    if np.any(unit.rate != 1.0):
        rate = ops.cast(unit.rate, unit.dtype)
        multiplier = rate if multiplier is None else rate * multiplier
    return EntryUpdate(
        partial(
            entry_step,
            rule,
            at,
            unit.weight_decay,
            multiplier,
            unit.variable_of,
        ),
        unit.dtype,
        unit.positions,
        unit.partitions,
        join([gradients[p] for p in unit.positions]),
        (*unit.variables, *unit.momentum),
        rule.momentum_of_gradient,
        unit.encoding,
    )


def multiplier_of(
    dtype: str, variable_of: int | np.ndarray, multipliers: Tensor | None
) -> Tensor | None:
    """Factor of the learning rate of a unit, of each entry if it has several.

    Variables that share an accumulator may differ in it.
    """
    if multipliers is None:
        return None
    multipliers = ops.cast(multipliers, dtype)
    if np.ndim(variable_of):
        return ops.take(multipliers, variable_of)
    return multipliers[variable_of]


def averaged(
    rule: Rule,
    time: Callable[[str], Tensor],
    dtype: str,
    g: Tensor,
    *momentum: Tensor,
) -> Tensors:
    """What is averaged over each block, of a gradient in any dtype."""
    g = ops.cast(g, dtype)
    if rule.second_moment.of_momentum is None:
        return rule.second_moment.averaged(g)
    (m,) = momentum
    return rule.second_moment.of_momentum(time(dtype), g, ops.cast(m, dtype))


def block_means(
    rule: Rule,
    batch: Batch,
    gradients: Sequence[Tensor],
    kernels: Kernels,
    of_entries: Callable[..., Tensors],
    of_all: bool,
) -> list[Tensors]:
    """What each unit is to be updated with; of all units, or as needed."""
    w = {p: unit.variables[0] for unit in batch.weights for p in unit.positions}
    momentum = momentum_of_each(batch) if rule.second_moment.of_momentum else {}

    def sums_of(i: int, dtype: str, partition: Partition) -> Tensors:
        def of_variable(g: Tensor) -> Tensors:
            return of_entries(dtype, g, *momentum.get(i, ()))

        return kernels.block_sums(of_variable, gradients[i], w[i], partition)

    means = []
    for unit in batch.accumulators:
        if not (unit.groups[0].has_blocks or of_all):
            means.append(())
            continue
        of_groups = []
        for positions, partitions in unit.groups:
            sums = [
                sums_of(i, unit.dtype, partition)
                for i, partition in zip(positions, partitions)
            ]
            of_groups.append([block_mean(x, partitions) for x in zip(*sums)])
        means.append(tuple(join(xs) for xs in zip(*of_groups)))
    return means


def momentum_of_each(batch: Batch) -> dict[int, Tensors]:
    """The momentum of each variable, by the position of its gradient."""
    return {
        position: (m,)
        for unit in batch.weights
        for position, m in zip(
            unit.positions,
            split(unit.momentum[0], [p.shape for p in unit.partitions]),
        )
    }


def plain_step(
    rule: Rule, at: Scalars, means: Tensors, *statistics: Tensor
) -> Tensors:
    """The step size of a variable without blocks."""
    return (at.rate,)


def block_step(
    rule: Rule, at: Scalars, means: Tensors, *statistics: Tensor
) -> Tensors:
    """Once per block: the step size, and the new statistics."""

    def accumulate(old: Tensor, mean: Tensor) -> Tensor:
        return at.decay * old + at.weight * mean

    new, v = rule.second_moment.update(accumulate, means, statistics)
    return step_size_of(rule, at, v), *at.if_taken(new, statistics)


def step_size_of(rule: Rule, at: Scalars, v: Tensor) -> Tensor:
    """The step size of each block, by its second moment."""
    step_size = at.numerator / rule.root(v, at.root_correction)
    if at.bounds is not None:
        low, high = at.bounds
        step_size = ops.where(step_size < low, low, step_size)
        step_size = ops.where(step_size > high, high, step_size)
    return step_size


def entry_step(
    rule: Rule,
    at: Scalars,
    weight_decay: float | np.ndarray,
    multiplier: Tensor | None,
    variable_of: int | np.ndarray,
    step_size: Tensor,
    *entries: Tensor,
) -> Tensors:
    """Once per entry: the new weight, and the new momentum if there is one."""
    g, w, *state = (ops.cast(x, at.learning_rate.dtype) for x in entries)
    learning_rate = at.learning_rate
    if multiplier is not None:
        if len(multiplier.shape):
            multiplier = reshape(multiplier, w.shape)
        learning_rate = learning_rate * multiplier
        if not rule.rate_last:
            step_size = step_size * multiplier
    m = state[0] if state else None
    if rule.momentum_of_gradient:
        m, x = at.momentum(m, g)
        direction = step_size * x
    else:
        m, direction = at.momentum(m, step_size * g)
    if rule.rate_last:
        direction = learning_rate * direction
    w_new = decayed(w, weight_decay, learning_rate) - direction
    w_new = in_16_bits(rule, at, w_new, entries[1].dtype, variable_of)
    new = (w_new, *([m] if state else []))
    return at.if_taken(new, (w, *state))


def in_16_bits(
    rule: Rule,
    at: Scalars,
    w: Tensor,
    dtype: Any,
    variable_of: int | np.ndarray,
) -> Tensor:
    """New weights as numbers of the dtype of their variable, if at random."""
    dtype = keras.backend.standardize_dtype(dtype)
    if not rule.stochastic_rounding or dtype not in SIXTEEN_BITS:
        return w
    noise = random_numbers(at.iterations, variable_of, tuple(w.shape), WEIGHT)
    return rounded_to(dtype, ops.cast(w, "float32"), noise)


def decayed(
    w: Tensor, weight_decay: float | np.ndarray, learning_rate: Tensor
) -> Tensor:
    """A weight after its decoupled decay."""
    if not np.any(weight_decay):
        return w
    return w - w * ops.cast(weight_decay, w.dtype) * learning_rate


def matrix_step(
    rule: Rule,
    at: Scalars,
    unit: MatrixWeights,
    gradients: Sequence[Tensor],
    kernels: Kernels,
    multipliers: Tensor | None,
) -> list[MatrixUpdate]:
    """The new statistics, weight and momentum of each variable of a unit."""
    momentum = []
    columns = []
    moved = []
    for position, state in zip(unit.positions, unit.momentum):
        g, *old = (
            ops.cast(value, unit.dtype)
            for value in (gradients[position], *state)
        )
        m, x = at.momentum(old[0] if old else None, g)
        momentum.append(at.if_taken((m,), tuple(old)) if old else ())
        moved.append(to_matrices(x, unit.matrices))
        columns.append(g)
    steps: Iterator[tuple[Tensors, Tensor]]
    if rule.matrix_moments is not None:
        steps = by_moments(rule, at, unit, columns, moved)
    else:
        function = cast(MatrixFunction, rule.matrix_function)
        steps = (
            scaled(rule, at, unit, i, x, kernels)
            for i, x in enumerate(kernels.of_matrices(function, moved))
        )
    new: list[MatrixUpdate] = []
    for i, (statistics, direction) in enumerate(steps):
        w = ops.cast(unit.variables[i], unit.dtype)
        multiplier = multiplier_of(unit.dtype, unit.variable_of[i], multipliers)
        rate = at.learning_rate
        if multiplier is not None:
            rate = rate * multiplier
        changed = decayed(w, unit.weight_decay[i], rate) - rate * direction
        own = unit.variables[i].dtype
        changed = in_16_bits(rule, at, changed, own, unit.variable_of[i])
        new.append((statistics, (*at.if_taken((changed,), (w,)), *momentum[i])))
    return new


def scaled(
    rule: Rule,
    at: Scalars,
    unit: MatrixWeights,
    i: int,
    x: Tensor,
    kernels: Kernels,
) -> tuple[Tensors, Tensor]:
    """The new statistics of variable `i` of a unit, and its step along `x`."""
    x = from_matrices(x, unit.matrices)
    w, p = unit.variables[i], unit.partition
    statistics: Sequence[Tensor] = ()
    if unit.statistics[i]:
        sums = kernels.block_sums(rule.second_moment.averaged, x, w, p)
        means = tuple(block_mean([s], [p]) for s in sums)
        old = (reshape(v, means[0].shape) for v in unit.statistics[i])
        step_size, *statistics = block_step(rule, at, means, *old)
        x = times(x, step_size, p)
    (s,) = kernels.block_sums(squares, x, w, unit.matrices.partition)
    mean = block_mean([s], [unit.matrices.partition])
    scale = RMS * ops.rsqrt(mean + TINY)
    return tuple(statistics), times(x, scale, unit.matrices.partition)


def by_moments(
    rule: Rule,
    at: Scalars,
    unit: MatrixWeights,
    gradients: Sequence[Tensor],
    xs: Sequence[Tensor],
) -> Iterator[tuple[Tensors, Tensor]]:
    """The new statistics of each variable of a unit, and its direction."""
    old, new = [], []
    for g, (v,) in zip(gradients, unit.statistics):
        g = to_matrices(g, unit.matrices)
        count, n, _ = g.shape
        old.append(reshape(v, (count, n, n)))
        new.append(accumulated(at.decay, at.weight, old[-1], g))
    number = ops.cast(ops.mod(at.t - 1.0, ROUND), "int32")
    turns = [ops.take(ops.convert_to_tensor(own), number) for own in unit.turns]
    moved = directions(partial(step_size_of, rule, at), new, xs, turns)
    for x, v, before in zip(moved, new, old):
        yield at.if_taken((v,), (before,)), from_matrices(x, unit.matrices)


def times(x: Tensor, values: Tensor, partition: Partition) -> Tensor:
    """Every entry of `x` times the value of its block."""
    shape, values = spread([values], [partition])
    return reshape(values * reshape(x, shape), partition.shape)


def sums_of_squares(
    units: Sequence[MatrixWeights],
    gradients: Sequence[Tensor],
    kernels: Kernels,
) -> list[Tensor]:
    """Those of each gradient: the function of a large one may be zero."""
    return [
        s
        for unit in units
        for w, position in zip(unit.variables, unit.positions)
        for s in kernels.block_sums(
            squares,
            ops.cast(gradients[position], unit.dtype),
            w,
            unit.matrices.partition,
        )
    ]
