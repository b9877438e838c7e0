"""JAX: what the plain path does not have, since its trainer compiles it."""

from collections.abc import Callable
from typing import Any

import jax
import keras


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled once for each shape of its arguments."""
    program: Callable[..., Any] = jax.jit(function)
    return program


def number_of_replicas(model: keras.Model) -> int:
    """How many copies of a model are trained together."""
    return int(jax.process_count())
