"""What to update in which call of a compiled function, and its arguments.

Both are for a call that is a node of a graph, such as one of `model.fit`.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_blockwise.state.storage import SMALL

Tensor = Any

# Fewest variables for two calls: each takes a tenth of a millisecond, and some
# microseconds for every variable.
TWO_CALLS = 32
# Fewest variables in the call that waits for the last gradient, which is that
# of the first layer.
FEW = 3
# Fewest short vectors that are worth an operation to join them.
JOINED = 16


def first_and_rest(accumulators: Sequence[Any]) -> list[slice]:
    """The first few variables and the rest, which share no accumulator.

    Args:
        accumulators: What the accumulator of each variable is known by.

    Returns:
        Two slices, or one of all if they cannot be cut or are few.
    """
    if len(accumulators) >= TWO_CALLS:
        last = {key: position for position, key in enumerate(accumulators)}
        end = 0
        for position, key in enumerate(accumulators):
            if end < position and position >= FEW:
                return [slice(position), slice(position, None)]
            end = max(end, last[key])
    return [slice(None)]


def short_vectors(tensors: Sequence[Tensor]) -> list[int]:
    """The positions of the short vectors; none if there are few."""
    positions = [
        i
        for i, tensor in enumerate(tensors)
        if tensor.shape.rank == 1
        and tensor.shape[0] < SMALL
        and tensor.dtype == tensors[0].dtype
    ]
    return positions if len(positions) >= JOINED else []


def join_vectors(
    tensors: Sequence[Tensor], positions: Sequence[int]
) -> list[Tensor]:
    """The tensors, those at the given positions at the end and in one."""
    if not positions:
        return list(tensors)
    others = [t for i, t in enumerate(tensors) if i not in positions]
    return [*others, tf.concat([tensors[i] for i in positions], axis=0)]


def splitter(
    tensors: Sequence[Tensor], positions: Sequence[int]
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The inverse of `join_vectors` for tensors of these shapes."""
    if not positions:
        return list
    sizes = [tensors[i].shape[0] for i in positions]

    def split(arguments: Sequence[Tensor]) -> list[Tensor]:
        *parts, joined = arguments
        for position, part in zip(positions, tf.split(joined, sizes)):
            parts.insert(position, part)
        return parts

    return split
