"""Momentum rules: `(m, x) -> (m, direction)`, made for step `t = 1, 2, ...`.

`x` is the gradient or the scaled gradient, `m` the state. Two conventions that
are easily confused, for a constant `x`:

    ema         m <- beta * m + (1 - beta) * x    converges to x
    heavy_ball  m <- beta * m + x                 converges to x / (1 - beta)

The weights move against `direction`, so `m` has the sign of the gradient.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_blockwise.algorithm.accumulators import one_minus_power

Tensor = Any
Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Of `1 - 0.96^i / 2` over i = 1, ..., t, up to where a factor is 1 in float64.
NADAM_PRODUCTS = np.cumprod(1.0 - 0.5 * 0.96 ** np.arange(1.0, 1000.0))


class Momentum(NamedTuple):
    """A momentum rule: its update at `t`, and whether it needs a state."""

    at: Callable[[Tensor], Update]
    has_state: bool = True


def none() -> Momentum:
    """No momentum, no state: the direction is `x`."""
    return Momentum(lambda t: lambda m, x: (m, x), has_state=False)


def ema(beta: float) -> Momentum:
    """Exponential moving average with bias correction (Adam)."""

    def at(t: Tensor) -> Update:
        correction = 1.0 / one_minus_power(beta, t)

        def update(m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            m = beta * m + (1.0 - beta) * x
            return m, m * correction

        return update

    return Momentum(at)


def nadam(beta: float) -> Momentum:
    """Adam's average with Nesterov's look ahead (Dozat's Nadam).

    With `u_t = beta * (1 - 0.96^t / 2)` and `U_t = u_1 * ... * u_t`, the
    direction is `u_{t+1} * m / (1 - U_{t+1}) + (1 - u_t) * x / (1 - U_t)`, as
    in `keras.optimizers.Nadam`.
    """

    def at(t: Tensor) -> Update:
        u, u_next = (beta * (1.0 - 0.5 * 0.96**s) for s in (t, t + 1.0))
        # A function of `t`: no state.
        last = ops.cast(ops.minimum(t, len(NADAM_PRODUCTS)) - 1.0, "int32")
        product = beta**t * ops.take(ops.cast(NADAM_PRODUCTS, t.dtype), last)
        of_m = u_next / (1.0 - product * u_next)
        of_x = (1.0 - u) / (1.0 - product)

        def update(m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            m = beta * m + (1.0 - beta) * x
            return m, of_m * m + of_x * x

        return update

    return Momentum(at)


def heavy_ball(beta: float) -> Momentum:
    """Polyak's momentum, as in `keras.optimizers.SGD(momentum=beta)`."""

    def update(m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        m = beta * m + x
        return m, m

    return Momentum(lambda t: update)


def nesterov(beta: float) -> Momentum:
    """Nesterov's momentum in the form of `keras.optimizers.SGD`."""

    def update(m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        m = beta * m + x
        return m, beta * m + x

    return Momentum(lambda t: update)


def nesterov_ema(beta: float) -> Momentum:
    """`nesterov` of an average: for a constant `x` the direction is `x`."""

    def update(m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        m = beta * m + (1.0 - beta) * x
        return m, beta * m + (1.0 - beta) * x

    return Momentum(lambda t: update)
