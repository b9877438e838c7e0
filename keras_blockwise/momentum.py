"""Momentum rules: `(m, x, t) -> (m, direction)`.

`x` is the gradient or the scaled gradient, `m` the state, `t = 1, 2, ...` the
step. Two conventions that are easily confused, for a constant `x`:

    ema         m <- beta * m + (1 - beta) * x    converges to x
    heavy_ball  m <- beta * m + x                 converges to x / (1 - beta)

The weights move against `direction`, so `m` has the sign of the gradient.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from keras_blockwise.accumulators import one_minus_power

Tensor = Any


class Momentum(NamedTuple):
    """A momentum rule, and whether it needs a state variable."""

    update: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    has_state: bool = True


def none() -> Momentum:
    """No momentum, no state: the direction is `x`."""
    return Momentum(lambda m, x, t: (m, x), has_state=False)


def ema(beta: float) -> Momentum:
    """Exponential moving average with bias correction (Adam)."""

    def update(m: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        m = beta * m + (1.0 - beta) * x
        return m, m * (1.0 / one_minus_power(beta, t))

    return Momentum(update)


def heavy_ball(beta: float) -> Momentum:
    """Polyak's momentum, as in `keras.optimizers.SGD(momentum=beta)`."""

    def update(m: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        m = beta * m + x
        return m, m

    return Momentum(update)


def nesterov(beta: float) -> Momentum:
    """Nesterov's momentum in the form of `keras.optimizers.SGD`."""

    def update(m: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        m = beta * m + x
        return m, beta * m + x

    return Momentum(update)
