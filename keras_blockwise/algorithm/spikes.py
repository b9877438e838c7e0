"""Spikes of the gradient are cut off, and the state starts anew at intervals.

SPAM: Huang et al. 2025, arXiv:2501.06842, in the form of the authors' code. A
reset forgets all earlier gradients: the step of a reset is the first of its
round. `t = 1, 2, ...` counts all steps.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_blockwise.algorithm.accumulators import Accumulator
from keras_blockwise.algorithm.blocks import reshape
from keras_blockwise.algorithm.blocks import spread
from keras_blockwise.algorithm.momentum import Momentum
from keras_blockwise.algorithm.momentum import Update
from keras_blockwise.algorithm.units import Accumulators
from keras_blockwise.algorithm.units import by_position

Tensor = Any
Limit = Callable[[Tensor, Tensor], Tensor]

# In so many steps after a start or a reset, `v` tells too little of a gradient.
GUARD = 20


def spike_limit(threshold: float, every: int) -> Limit:
    """`(t, v) -> limit`, which no `g^2 > threshold * v` may exceed."""

    def limit(t: Tensor, v: Tensor) -> Tensor:
        # Where v is 0, it would stay 0, and the weights where they are.
        unknown = ops.logical_or(since_reset(t, every) < GUARD, v <= 0.0)
        return ops.where(unknown, math.inf, ops.sqrt(threshold * v))

    return limit


def cut_spikes(
    limit: Limit,
    time: Callable[[str], Tensor],
    units: Sequence[Accumulators],
    gradients: Sequence[Tensor],
) -> list[Tensor]:
    """The gradients, with no entry beyond the limit of its block.

    Args:
        limit: As `spike_limit` returns it.
        time: The number of the step, in a dtype.
        units: The second moments before the step.
        gradients: One dense tensor per variable.
    """
    new = list(gradients)
    for unit in units:
        if not unit.statistics:  # No blocks to compare with.
            continue
        limits = by_position(
            unit.groups, limit(time(unit.dtype), unit.statistics[0])
        )
        for positions, partitions in unit.groups:
            for i, partition in zip(positions, partitions):
                shape, most = spread([limits[i]], [partition])
                g = reshape(ops.cast(gradients[i], unit.dtype), shape)
                g = ops.where(ops.abs(g) > most, ops.sign(g) * most, g)
                new[i] = reshape(g, partition.shape)
    return new


def restarted_accumulator(
    accumulator: Accumulator, every: int, corrections_too: bool
) -> Accumulator:
    """An accumulator that forgets what it has before every so many steps."""

    def coefficients(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = number_in_round(t, every) if corrections_too else t
        decay, weight, correction = accumulator(n)
        return decay * kept(t, every), weight, correction

    return coefficients


def restarted_momentum(
    momentum: Momentum, every: int, corrections_too: bool, warmup: int
) -> Momentum:
    """The same for a momentum, whose direction is short after a reset."""

    def at(t: Tensor) -> Update:
        update = momentum.at(
            number_in_round(t, every) if corrections_too else t
        )

        def restarted(m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            m, direction = update(kept(t, every) * m, x)
            return m, direction * warmed_up(t, every, warmup)

        return restarted

    return Momentum(at)


def since_reset(t: Tensor, every: int) -> Tensor:
    """How many steps ago the last reset was, or the start."""
    # The dtype of a plain number would depend on `floatx`.
    return ops.mod(t, ops.cast(every, t.dtype))


def number_in_round(t: Tensor, every: int) -> Tensor:
    """1, 2, ..., at first and again from each reset on."""
    return ops.where(t < every, t, since_reset(t, every) + 1.0)


def kept(t: Tensor, every: int) -> Tensor:
    """What remains of the past: 0 at a reset, else 1."""
    return ops.cast(since_reset(t, every) > 0.0, t.dtype)


def warmed_up(t: Tensor, every: int, warmup: int) -> Tensor:
    """A factor of the step, from 0.01 at a reset to 1, along a cosine."""
    # A table: on JAX, Keras computes the cosine of float64 in float32.
    angles = np.arange(warmup) * (np.pi / (warmup + 1))
    factors = np.append(1.0 - 0.495 * (1.0 + np.cos(angles)), 1.0)
    since = ops.where(t < every, every, since_reset(t, every))
    now = ops.cast(ops.minimum(since, warmup), "int32")
    return ops.take(ops.cast(factors, t.dtype), now)
