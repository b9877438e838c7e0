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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_blockwise.accumulators import Accumulator
from keras_blockwise.momentum import Momentum
from keras_blockwise.partition import Partition
from keras_blockwise.reduction import Materialize
from keras_blockwise.reduction import block_mean

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


def scale_blocks(scale: Tensor, x: Tensor, p: Partition) -> Tensor:
    """`x` with each of its blocks multiplied by its entry of `scale`."""
    if p.group is not None:
        return x * scale
    if len(p.view_shape) > 5:  # TensorFlow broadcasts no higher without XLA.
        for axis, n in enumerate(p.block_shape):
            scale = ops.repeat(scale, n, axis=axis)
        return x * scale
    x = ops.reshape(x, p.view_shape) * ops.reshape(scale, p.view_grid)
    return ops.reshape(x, p.shape)


def block_means(
    rule: Rule,
    gradients: Sequence[Tensor],
    partitions: Sequence[Partition],
    materialize: Materialize | None = None,
) -> dict[str, Tensor]:
    """What the statistics of a step average: `s`, and the block mean of g.

    `s` is finite if and only if the squares of all of g are.
    """
    squares = [ops.square(g) for g in gradients]
    means = {"velocity": block_mean(squares, partitions, materialize)}
    if rule.centered:
        means["average_gradient"] = block_mean(
            gradients, partitions, materialize
        )
    return means


def block_step(
    rule: Rule,
    t: Tensor,
    learning_rate: Tensor,
    means: dict[str, Tensor],
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    weight_decays: Sequence[float],
    moments: Sequence[Tensor],
    statistics: dict[str, Tensor],
    partitions: Sequence[Partition],
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """One step of all variables that share one accumulator.

    Args:
        rule: The optimizer.
        t: Scalar, 1 on the first step.
        learning_rate: Scalar.
        means: `block_means(rule, gradients, partitions)`.
        gradients: One tensor per variable.
        weights: The variables.
        weight_decays: Decoupled weight decay of each variable.
        moments: The momentum of each variable; anything if the rule has none.
        statistics: `rule.statistics`, each of shape `accumulator_shape`.
        partitions: The blocks of each variable.

    All tensors have one floating-point dtype.

    Returns:
        The new `weights`, `moments` and `statistics`.
    """
    decay, weight, correction = rule.accumulator(t)
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
    root_correction = correction**0.5
    root = {
        "outside": lambda: ops.sqrt(v) + rule.epsilon,
        "inside": lambda: ops.sqrt(v + rule.epsilon),
        "corrected": lambda: ops.sqrt(v) + rule.epsilon * root_correction,
    }[rule.epsilon_added]()
    scale = learning_rate * root_correction / root

    new_weights, new_moments = [], []
    for g, w, weight_decay, m, p in zip(
        gradients, weights, weight_decays, moments, partitions
    ):
        if rule.momentum_of_gradient:
            m, x = rule.momentum.update(m, g, t)
            direction = scale_blocks(scale, x, p)
        else:
            m, direction = rule.momentum.update(m, scale_blocks(scale, g, p), t)
        if weight_decay:
            w = w - w * weight_decay * learning_rate
        new_weights.append(w - direction)
        new_moments.append(m)
    return new_weights, new_moments, new_statistics
