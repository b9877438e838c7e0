"""Checks of arguments: the argument, the rule, and the value received."""

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

KERAS_NUMBERS = {
    "clipnorm",
    "clipvalue",
    "ema_momentum",
    "global_clipnorm",
    "gradient_accumulation_steps",
    "loss_scale_factor",
    "weight_decay",
}
# Neither numbers nor tensors.
CONTAINERS = (str, bytes, list, tuple, set, dict)


def is_number(value: Any) -> bool:
    kinds = (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool)


def check_learning_rate(learning_rate: Any) -> Any:
    if callable(learning_rate):  # Also a learning rate schedule.
        return learning_rate
    if is_number(learning_rate) and 0 <= learning_rate < math.inf:
        return float(learning_rate)
    raise ValueError(
        "`learning_rate` must be a number >= 0, a `LearningRateSchedule` or a "
        f"callable. Received: learning_rate={learning_rate!r}."
    )


def check_relative_rate(
    name: str, rate: Any, learning_rate: Any
) -> list[float] | None:
    """A rate, and the learning rate that it stands beside.

    Args:
        name: Of the argument, for the errors.
        rate: What a user has given: a number, such a pair, or `None`.
        learning_rate: Where only a number is given, what it stands beside: a
            number, or the largest one that a schedule says it starts from.
    """
    if rate is None:
        return None
    is_pair = isinstance(rate, list | tuple) and len(rate) == 2
    pair: Any = rate if is_pair else (rate, start_of(learning_rate))
    valid = all(is_number(number) and 0 <= number < math.inf for number in pair)
    if not valid or not pair[1]:
        raise ValueError(
            f"`{name}` must be a number >= 0 beside a `learning_rate` that is "
            "a number > 0 or a schedule of Keras, or else a pair: it, and the "
            "learning rate > 0 that it stands beside. Received: "
            f"{name}={rate!r}. The `learning_rate` is {learning_rate!r}."
        )
    return [float(number) for number in pair]


def start_of(learning_rate: Any) -> Any:
    """A learning rate, or where a schedule is between warm-up and decay."""
    if is_number(learning_rate):
        return learning_rate
    names = ("initial_learning_rate", "warmup_target")
    values: list[Any] = [getattr(learning_rate, name, None) for name in names]
    if isinstance(
        learning_rate, keras.optimizers.schedules.PiecewiseConstantDecay
    ):
        values += learning_rate.values
    return max(filter(is_number, values), default=None)


def check_fraction(name: str, value: Any) -> float:
    """A hyper-parameter in [0, 1)."""
    return check_number(name, value, 1.0)


def check_non_negative(name: str, value: Any) -> float:
    return check_number(name, value, math.inf)


def check_number(name: str, value: Any, end: float) -> float:
    if not is_number(value) or not 0 <= value < end:
        raise ValueError(
            f"`{name}` must be a number in [0, {end}). Received: "
            f"{name}={value!r}."
        )
    return float(value)


def check_integer(
    name: str, value: Any, least: int, most: float = math.inf
) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        raise ValueError(
            f"`{name}` must be an integer in [{least}, {most}]. Received: "
            f"{name}={value!r}."
        )
    return int(value)


def check_positive_pair(name: str, value: Any) -> list[float] | None:
    """Two numbers > 0, or `None`."""
    if value is None:
        return None
    pair = value if isinstance(value, (tuple, list)) else ()
    valid = [float(x) for x in pair if is_number(x) and 0 < x < math.inf]
    if len(valid) != len(pair) or len(pair) != 2:
        raise ValueError(
            f"`{name}` must be `None` or a pair of numbers > 0. Received: "
            f"{name}={value!r}."
        )
    return valid


def check_keras_numbers(arguments: Mapping[str, Any]) -> None:
    """Arguments of Keras's base class that it computes with, unchecked."""
    for name in KERAS_NUMBERS & arguments.keys():
        value = arguments[name]
        optional = name != "ema_momentum"
        if isinstance(value, CONTAINERS) or (value is None and not optional):
            raise ValueError(
                f"`{name}` must be a number{' or `None`' * optional}. "
                f"Received: {name}={value!r}."
            )


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    if not any(value is choice or value == choice for choice in choices):
        raise ValueError(
            f"`{name}` must be one of {list(choices)}. Received: "
            f"{name}={value!r}."
        )
    return value
