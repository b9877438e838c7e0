"""THE STEP: the whole mathematics of every optimizer of this package.

For the variables that share one accumulator, with gradients `g`, step
`t = 1, 2, ...` and `mean_b` the mean over a block:

    s = mean_b(g^2)
    v <- decay * v + weight * s                       accumulator(t)
    scale = learning_rate * sqrt(correction) / root(v)
    m, direction = momentum(m, scale * g)             momentum of the scaled g
    m, x = momentum(m, g); direction = scale * x      or of g itself
    w <- w - learning_rate * weight_decay * w - direction

with `root(v) = sqrt(v) + epsilon`, `sqrt(v + epsilon)`, or, with epsilon added
after the correction, `sqrt(v) + epsilon * sqrt(correction)`. With `amsgrad`,
`v` in the root is the largest so far (arXiv:1904.09237); with `centered` it is
`v - a^2` for the accumulated block mean `a` of g (arXiv:1308.0850, eq. 39).

Blockwise adaptivity: Zheng & Kwok 2019, arXiv:1905.09899.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_blockwise.algorithm.accumulators import Accumulator
from keras_blockwise.algorithm.momentum import Momentum
from keras_blockwise.algorithm.momentum import Update
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.blocking.partition import joined_blocks
from keras_blockwise.reduction import Materialize
from keras_blockwise.reduction import block_mean
from keras_blockwise.reshaping import join

Tensor = Any


@dataclass(frozen=True)
class Rule:
    """The choices that make the step one optimizer or another."""

    accumulator: Accumulator
    momentum: Momentum
    momentum_of_gradient: bool
    epsilon: float
    epsilon_added: str = "outside"  # Or "inside", or "corrected".
    amsgrad: bool = False
    centered: bool = False
    initial_velocity: float = 0.0

    @property
    def statistics(self) -> dict[str, float]:
        """Initial value of each block statistic, in the order it is saved."""
        statistics = {"velocity": self.initial_velocity}
        if self.amsgrad:
            statistics["velocity_hat"] = 0.0
        if self.centered:
            statistics["average_gradient"] = 0.0
        return statistics


def broadcastable(
    scales: Sequence[Tensor], partitions: Sequence[Partition]
) -> tuple[Shape, Tensor]:
    """A shape for a variable, and its `scale` in one that broadcasts to it.

    Of several variables it is that of all of them joined.

    The scale is reshaped also where it has that shape: were its division next
    to a product, TensorFlow might reorder them, on one replica and not on
    another.
    """
    if len(partitions) > 1:
        scale, size = join(scales), sum(math.prod(p.shape) for p in partitions)
        if scale.shape[0] < size:
            scale = ops.take(scale, joined_blocks(partitions))
        return (size,), ops.reshape(scale, (size,))
    (scale,), (p,) = scales, partitions
    if p.group is not None:
        return p.shape, ops.reshape(scale, (1,) * len(p.shape))
    if len(p.view_shape) > 5:  # TensorFlow broadcasts no higher without XLA.
        for axis, n in enumerate(p.block_shape):
            scale = ops.repeat(scale, n, axis=axis)
        return p.shape, scale
    if all(tile in (1, n) for n, tile in zip(p.shape, p.block_shape)):
        return p.shape, ops.reshape(scale, p.grid)
    return p.view_shape, ops.reshape(scale, p.view_grid)


def averaged(rule: Rule, g: Tensor) -> dict[str, Tensor]:
    """What each statistic of a step averages over a block."""
    return {
        "velocity": ops.square(g),
        **({"average_gradient": g} if rule.centered else {}),
    }


def block_means(
    rule: Rule,
    gradients: Sequence[Tensor],
    partitions: Sequence[Partition],
    materialize: Materialize | None = None,
) -> dict[str, Tensor]:
    """Means of `averaged`: `s`, and the block mean of g.

    `s` is finite if and only if the squares of all of g are.
    """
    each = [averaged(rule, g) for g in gradients]
    return {
        name: block_mean([xs[name] for xs in each], partitions, materialize)
        for name in each[0]
    }


class Scalars(NamedTuple):
    """What all blocks of a step share; see the formulas above."""

    learning_rate: Tensor
    decay: Tensor
    weight: Tensor
    root_correction: Tensor
    numerator: Tensor
    momentum: Update

    @classmethod
    def of(cls, rule: Rule, t: Tensor, learning_rate: Tensor) -> "Scalars":
        """Those of step `t`, a scalar that is 1 on the first step."""
        decay, weight, correction = rule.accumulator(t)
        root = correction**0.5
        return cls(
            learning_rate,
            decay,
            weight,
            root_correction=root,
            numerator=learning_rate * root,
            momentum=rule.momentum.at(t),
        )


def block_step(
    rule: Rule,
    scalars: Scalars,
    means: dict[str, Tensor],
    statistics: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of a step that is made once per block.

    Args:
        rule: The optimizer.
        scalars: `Scalars.of(rule, t, learning_rate)`.
        means: `block_means(rule, gradients, partitions)`.
        statistics: `rule.statistics`, each of shape `accumulator_shape`.

    All tensors have one floating-point dtype.

    Returns:
        The `scale` and the new `statistics`, of shape `accumulator_shape`.
    """
    decay, weight = scalars.decay, scalars.weight
    v = decay * statistics["velocity"] + weight * means["velocity"]
    new_statistics = {"velocity": v}
    if rule.amsgrad:
        v = ops.maximum(statistics["velocity_hat"], v)
        new_statistics["velocity_hat"] = v
    if rule.centered:
        a = decay * statistics["average_gradient"]
        a = a + weight * means["average_gradient"]
        new_statistics["average_gradient"] = a
        v = v - ops.square(a)
    root = {
        "outside": lambda: ops.sqrt(v) + rule.epsilon,
        "inside": lambda: ops.sqrt(v + rule.epsilon),
        "corrected": lambda: (
            ops.sqrt(v) + rule.epsilon * scalars.root_correction
        ),
    }[rule.epsilon_added]()
    return scalars.numerator / root, new_statistics


def entry_step(
    rule: Rule,
    scalars: Scalars,
    weight_decay: float | np.ndarray,
    scale: Tensor,
    g: Tensor,
    w: Tensor,
    m: Tensor = None,
) -> tuple[Tensor, Tensor]:
    """The part of a step that is made once per entry.

    Args:
        rule: The optimizer.
        scalars: `Scalars.of(rule, t, learning_rate)`.
        weight_decay: Decoupled weight decay of the variable, or of each entry.
        scale: Of `block_step`, broadcastable to the other tensors.
        g: Entries of the gradient.
        w: The same entries of the variable.
        m: The same entries of its momentum; `None` if the rule has none.

    All tensors have one floating-point dtype.

    Returns:
        The new `w` and `m`. The new `m` does not depend on `w`.
    """
    if rule.momentum_of_gradient:
        m, x = scalars.momentum(m, g)
        direction = scale * x
    else:
        m, direction = scalars.momentum(m, scale * g)
    if np.any(weight_decay):
        decay = ops.cast(weight_decay, scalars.learning_rate.dtype)
        w = w - w * decay * scalars.learning_rate
    return w - direction, m


def own_block_step(
    rule: Rule,
    scalars: Scalars,
    weight_decay: float | np.ndarray,
    g: Tensor,
    w: Tensor,
    *state: Tensor,
) -> tuple[Tensor, ...]:
    """`block_step` and `entry_step` where every entry is a block.

    Args:
        rule: The optimizer.
        scalars: `Scalars.of(rule, t, learning_rate)`.
        weight_decay: Decoupled weight decay of the variable.
        g: Entries of the gradient.
        w: The same entries of the variable.
        *state: The same of its momentum if the rule has one, and of each of
            `rule.statistics`, the last first.

    All tensors have one floating-point dtype.

    Returns:
        The new `w` and `state`, none of which depends on one before it.
    """
    names = list(rule.statistics)[::-1]
    momentum = state[: -len(names)]
    statistics = dict(zip(names, state[len(momentum) :]))
    scale, new = block_step(rule, scalars, averaged(rule, g), statistics)
    scale = ops.reshape(scale, g.shape)  # See `broadcastable`.
    new_w, new_m = entry_step(
        rule, scalars, weight_decay, scale, g, w, *momentum
    )
    return new_w, *[new_m for _ in momentum], *[new[name] for name in names]
