"""How the block statistics of past steps are weighted.

Every accumulator of this package is the one recurrence

    v <- decay * v + weight * s

over the block statistic `s` of step `t = 1, 2, ...`, followed by a division
by `correction`. A factory below returns the function
`t -> (decay, weight, correction)`; `t` is a floating-point scalar tensor.
"""

import math
from collections.abc import Callable
from typing import Any

from keras import ops

Tensor = Any
Accumulator = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def one_minus_power(beta: float, t: Tensor) -> Tensor:
    """`1 - beta**t`, also where float32 loses digits, as in 1 - 0.999."""
    return -ops.expm1(t * math.log(beta)) if beta else 1.0


def exponential(beta: float) -> Accumulator:
    """Exponential moving average, corrected for its start at zero (Adam)."""
    return lambda t: (beta, 1.0 - beta, one_minus_power(beta, t))


def uncorrected_exponential(beta: float) -> Accumulator:
    """Exponential moving average as it stands (RMSprop)."""
    return lambda t: (beta, 1.0 - beta, 1.0)


def polynomial(power: float) -> Accumulator:
    """Weighted mean whose weights grow as `t**power`; 0 is the plain mean.

    The weight of step `i` is `binomial(i + power - 1, power)`
    (weights that grow polynomially: arXiv:1905.09899).
    """

    def coefficients(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = (power + 1.0) / (t + power)
        return 1.0 - weight, weight, 1.0

    return coefficients


def cumulative() -> Accumulator:
    """Plain sum (Adagrad)."""
    return lambda t: (1.0, 1.0, 1.0)
