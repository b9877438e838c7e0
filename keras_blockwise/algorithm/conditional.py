"""A second moment without a state: what the momentum makes likely.

BCOS: arXiv:2507.08963, with a conditional estimator of the second moment of the
momentum, in the form of the authors' code. Instead of a bias correction, the
momentum is the gradient in step `t = 1`.
"""

from typing import Any

from keras import ops

from keras_blockwise.algorithm.momentum import Momentum
from keras_blockwise.algorithm.momentum import Update
from keras_blockwise.algorithm.second_moment import Accumulate
from keras_blockwise.algorithm.second_moment import SecondMoment
from keras_blockwise.algorithm.second_moment import Tensors
from keras_blockwise.algorithm.second_moment import squares

Tensor = Any


def momentum_from_first(beta: float) -> Momentum:
    """Exponential moving average that starts at the first `x`."""

    def at(t: Tensor) -> Update:
        b = decay(beta, t)

        def update(m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            m = b * m + (1.0 - b) * x
            return m, m

        return update

    return Momentum(at)


def conditional_square(beta: float) -> SecondMoment:
    """The mean of what is expected of the squared momentum, given the last `m`.

    The expectation of `(beta * m + (1 - beta) * g)^2`, with the new momentum
    in the place of that of `g`, and `g^2` in that of its square.
    """

    def of_momentum(t: Tensor, g: Tensor, m: Tensor) -> Tensors:
        b = decay(beta, t)
        old, own = b * m, (1.0 - b) * g
        cross = 2.0 * (1.0 - b) * old * (old + own)
        return (ops.square(old) + cross + ops.square(own),)

    def update(
        accumulate: Accumulate, means: Tensors, statistics: Tensors
    ) -> tuple[Tensors, Tensor]:
        return (), means[0]

    return SecondMoment({}, squares, update, of_momentum if beta else None)


def decay(beta: float, t: Tensor) -> Tensor:
    """0 in the first step, then `beta`."""
    return beta * ops.cast(t > 1.0, t.dtype)
