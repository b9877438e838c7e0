"""THE STEP: the whole mathematics of every optimizer of this package.

For variables `w` with gradients `g`, step `t = 1, 2, ...`, and `mean_b` the
mean over a block:

    s = mean_b(g^2)
    v <- decay * v + weight * s                       accumulator(t)
    step_size = learning_rate * sqrt(correction) / root(v)
    m, direction = momentum(m, step_size * g)         momentum of the scaled g
    m, x = momentum(m, g); direction = step_size * x  or of g itself
    w <- w - learning_rate * weight_decay * w - direction

`v` and `step_size` are numbers of a block, `m` and `w` of an entry. Without
blocks, `step_size = learning_rate`. A multiplier is a factor of the learning
rate of one variable. The forms of `v` and `root` are in `second_moment`, those
of the coefficients in `accumulators` and `momentum`; what may be cut off from g
first, in `spikes`. Blockwise adaptivity: Zheng & Kwok 2019, arXiv:1905.09899.
"""

import functools
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from typing import NamedTuple
from typing import Protocol

import numpy as np
from keras import ops

from keras_blockwise.algorithm.accumulators import Accumulator
from keras_blockwise.algorithm.blocks import block_mean
from keras_blockwise.algorithm.blocks import join
from keras_blockwise.algorithm.blocks import reshape
from keras_blockwise.algorithm.blocks import split
from keras_blockwise.algorithm.momentum import Momentum
from keras_blockwise.algorithm.momentum import Update
from keras_blockwise.algorithm.second_moment import Root
from keras_blockwise.algorithm.second_moment import SecondMoment
from keras_blockwise.algorithm.second_moment import Tensors
from keras_blockwise.algorithm.spikes import Limit
from keras_blockwise.algorithm.spikes import cut_spikes
from keras_blockwise.algorithm.units import Batch
from keras_blockwise.algorithm.units import BlockUpdate
from keras_blockwise.algorithm.units import EntryUpdate
from keras_blockwise.algorithm.units import Weights
from keras_blockwise.blocking.partition import Partition

Tensor = Any


@dataclass(frozen=True)
class Rule:
    """What makes the step one optimizer or another."""

    second_moment: SecondMoment
    accumulator: Accumulator
    root: Root
    momentum: Momentum
    momentum_of_gradient: bool = False
    limit: Limit | None = None


class Scalars(NamedTuple):
    """What all blocks of step `t` share; see the formulas above."""

    learning_rate: Tensor
    decay: Tensor
    weight: Tensor
    root_correction: Tensor
    numerator: Tensor
    momentum: Update
    taken: Tensor = True

    @classmethod
    def of(
        cls, rule: Rule, t: Tensor, learning_rate: Tensor, taken: Tensor = True
    ) -> "Scalars":
        decay, weight, correction = rule.accumulator(t)
        root = correction**0.5
        return cls(
            learning_rate,
            decay,
            weight,
            root_correction=root,
            numerator=learning_rate * root,
            momentum=rule.momentum.at(t),
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

    def run(
        self, blocks: Sequence[BlockUpdate], entries: Sequence[EntryUpdate]
    ) -> tuple[Sequence[Tensors], Any]:
        """The new statistics of each unit, and the new values of each unit."""


def step(
    rule: Rule,
    batch: Batch,
    gradients: Sequence[Tensor],
    learning_rate: Tensor,
    iterations: Tensor,
    kernels: Kernels,
    skip_nonfinite: bool = False,
    multipliers: Tensor | None = None,
) -> tuple[Sequence[Tensors], Any, Tensor]:
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
        momentum of each of `batch.weights`, and whether the step was taken.
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
        finite = [ops.all(ops.isfinite(x)) for x in checked]
        taken = ops.all(ops.stack(finite))

    @functools.cache
    def at(dtype: str) -> Scalars:
        rate = ops.cast(learning_rate, dtype)
        return Scalars.of(rule, time(dtype), rate, taken)

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
    return *kernels.run(blocks, entries), taken


def entry_update(
    rule: Rule,
    at: Scalars,
    unit: Weights,
    gradients: Sequence[Tensor],
    multipliers: Tensor | None,
) -> EntryUpdate:
    """What is computed once per entry of a unit."""
    multiplier = multiplier_of(unit, multipliers)
    return EntryUpdate(
        partial(entry_step, rule, at, unit.weight_decay, multiplier),
        unit.dtype,
        unit.positions,
        unit.partitions,
        join([gradients[p] for p in unit.positions]),
        (*unit.variables, *unit.momentum),
        rule.momentum_of_gradient,
    )


def multiplier_of(unit: Weights, multipliers: Tensor | None) -> Tensor | None:
    """Factor of the learning rate of a unit, of each entry if it has several.

    Variables that share an accumulator may differ in it.
    """
    if multipliers is None:
        return None
    multipliers, number = ops.cast(multipliers, unit.dtype), unit.variable_of
    if np.ndim(number):
        return ops.take(multipliers, number)
    return multipliers[number]


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
    return (at.learning_rate,)


def block_step(
    rule: Rule, at: Scalars, means: Tensors, *statistics: Tensor
) -> Tensors:
    """Once per block: the step size, and the new statistics."""

    def accumulate(old: Tensor, mean: Tensor) -> Tensor:
        return at.decay * old + at.weight * mean

    new, v = rule.second_moment.update(accumulate, means, statistics)
    step_size = at.numerator / rule.root(v, at.root_correction)
    return step_size, *at.if_taken(new, statistics)


def entry_step(
    rule: Rule,
    at: Scalars,
    weight_decay: float | np.ndarray,
    multiplier: Tensor | None,
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
        step_size = step_size * multiplier
    m = state[0] if state else None
    if rule.momentum_of_gradient:
        m, x = at.momentum(m, g)
        direction = step_size * x
    else:
        m, direction = at.momentum(m, step_size * g)
    decayed = w
    if np.any(weight_decay):
        decay = ops.cast(weight_decay, w.dtype)
        decayed = w - w * decay * learning_rate
    new = (decayed - direction, *([m] if state else []))
    return at.if_taken(new, (w, *state))
