"""JAX: what the plain path does not have, since its trainer compiles it."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import keras


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled once for each shape of its arguments."""
    program: Callable[..., Any] = jax.jit(function)
    return program


def reading(
    function: Callable[..., Any], variables: Sequence[Any]
) -> Callable[..., Any]:
    """The function, whose first argument is the values of variables."""
    program = compiled(function)
    return lambda *others: program([v.value for v in variables], *others)


def number_of_replicas(model: keras.Model) -> int:
    """How many copies of a model are trained together."""
    return int(jax.process_count())
