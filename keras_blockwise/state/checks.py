"""Variables and gradients, checked before anything is changed."""

from collections.abc import Hashable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

from keras_blockwise.blocking.axes import path_of
from keras_blockwise.state.slots import FLOATS

Variable = Any


def check_distinct(
    variables: Sequence[Variable], keys: Iterable[Hashable]
) -> None:
    """Raises an error if a variable is in a list twice.

    Args:
        variables: The list.
        keys: What each of them is known by.
    """
    seen = set()
    for variable, key in zip(variables, keys):
        if key in seen:
            raise ValueError(
                "A variable must be in the list of variables once. Received: "
                f"{path_of(variable)!r} twice. Leave out the second one; where "
                "both have a gradient, give the sum."
            )
        seen.add(key)


def check_trainable(variable: Variable) -> None:
    """Raises an error if a variable cannot be trained."""
    dtype = str(getattr(variable.dtype, "name", variable.dtype))
    if dtype not in FLOATS:
        remedy = "Leave it out of the trainable variables."
        if dtype.startswith("complex"):
            remedy = "Train two variables, its real and its imaginary part."
        raise ValueError(
            f"Variable {path_of(variable)!r} must have one of the dtypes "
            f"{FLOATS}. Received: dtype={dtype}. {remedy}"
        )
    shape = variable.shape
    if getattr(shape, "rank", 0) is None or None in tuple(shape):
        raise ValueError(
            f"Variable {path_of(variable)!r} must have a shape that is fully "
            f"known. Received: shape={shape}. Create it without `shape`."
        )


def check_number_of_gradients(number: int, variables: int) -> None:
    if number != variables:
        raise ValueError(
            "`grads` must have one gradient, or `None`, for each variable. "
            f"Received: {number} for {variables} variables."
        )


def check_gradient_shape(
    shape: Sequence[int | None], variable: Variable
) -> None:
    """Raises an error if a gradient does not broadcast to its variable.

    Args:
        shape: Shape of the gradient; `None` for a size that is not known yet.
        variable: The variable.
    """
    sizes = list(zip(reversed(shape), reversed(variable.shape)))
    if len(sizes) < len(shape) or any(
        n not in (None, 1, size) for n, size in sizes
    ):
        raise ValueError(
            "A gradient must have the shape of its variable, or broadcast to "
            f"it. Received: a gradient of shape {tuple(shape)} for variable "
            f"{path_of(variable)!r} of shape {tuple(variable.shape)}."
        )
