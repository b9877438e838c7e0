"""Estimators of the second moment of a block, and the root that divides.

An estimator keeps some numbers per block, its statistics, in the order in which
they are saved. A step averages functions of the gradient over each block,
accumulates these means (see `accumulators`), and returns the second moment `v`
of each block. The first mean is that of the squared gradient.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from keras import ops

Tensor = Any
Tensors = tuple[Tensor, ...]
Accumulate = Callable[[Tensor, Tensor], Tensor]
Root = Callable[[Tensor, Tensor], Tensor]


class SecondMoment(NamedTuple):
    """An estimator.

    Args:
        statistics: Initial value of each statistic, by its name.
        averaged: `g -> ...`, what to average over each block.
        update: `(accumulate, means, statistics) -> (statistics, v)`, where
            `accumulate(old, mean)` is one step of the accumulator.
        of_momentum: `(t, g, m) -> ...`, which takes the place of `averaged`
            if the momentum before the step is needed as well.
    """

    statistics: dict[str, float]
    averaged: Callable[[Tensor], Tensors]
    update: Callable[[Accumulate, Tensors, Tensors], tuple[Tensors, Tensor]]
    of_momentum: Callable[[Tensor, Tensor, Tensor], Tensors] | None = None


def mean_of_squares(initial_value: float = 0.0) -> SecondMoment:
    """The accumulated mean of squared gradients."""

    def update(
        accumulate: Accumulate, means: Tensors, statistics: Tensors
    ) -> tuple[Tensors, Tensor]:
        v = accumulate(statistics[0], means[0])
        return (v,), v

    return SecondMoment({"velocity": initial_value}, squares, update)


def largest_mean_of_squares() -> SecondMoment:
    """The largest so far of `mean_of_squares` (AMSGrad, arXiv:1904.09237)."""

    def update(
        accumulate: Accumulate, means: Tensors, statistics: Tensors
    ) -> tuple[Tensors, Tensor]:
        v, v_hat = statistics
        v = accumulate(v, means[0])
        # With PyTorch, Keras computes the maximum of float64 in float32.
        v_hat = ops.where(v_hat > v, v_hat, v)
        return (v, v_hat), v_hat

    return SecondMoment({"velocity": 0.0, "velocity_hat": 0.0}, squares, update)


def variance() -> SecondMoment:
    """`mean_of_squares` less the square of the accumulated mean of g.

    Centered RMSprop: Graves 2013, arXiv:1308.0850, eq. 39.
    """

    def update(
        accumulate: Accumulate, means: Tensors, statistics: Tensors
    ) -> tuple[Tensors, Tensor]:
        v, a = map(accumulate, statistics, means)
        return (v, a), v - ops.square(a)

    return SecondMoment(
        {"velocity": 0.0, "average_gradient": 0.0},
        lambda g: (ops.square(g), g),
        update,
    )


def squares(g: Tensor) -> Tensors:
    return (ops.square(g),)


def epsilon_outside(epsilon: float) -> Root:
    """`sqrt(v) + epsilon`, before the bias correction: Keras's Adam."""
    return lambda v, root_correction: ops.sqrt(v) + epsilon


def epsilon_inside(epsilon: float) -> Root:
    """`sqrt(v + epsilon)`: Keras's Adagrad and RMSprop."""
    return lambda v, root_correction: ops.sqrt(v + epsilon)


def epsilon_corrected(epsilon: float) -> Root:
    """Epsilon added to the corrected root: the Adam of PyTorch."""
    return lambda v, root_correction: ops.sqrt(v) + epsilon * root_correction
