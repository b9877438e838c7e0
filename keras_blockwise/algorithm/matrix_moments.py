"""Second moments that are matrices: of a block, not only of its entries.

AdaBlock: arXiv:1905.10757, in the form of the authors' code. With `g` the
entries of a block as a column,

    V <- decay * V + weight * g g^T;  V = Q diag(S) Q^T
    direction = Q diag(step_size(S)) Q^T x

where `step_size(v)` is that of a block of one entry, whose `V` is `v`.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_blockwise.algorithm.accumulators import one_minus_power
from keras_blockwise.algorithm.orthogonal import together
from keras_blockwise.algorithm.orthogonal import transposed
from keras_blockwise.blocking.partition import Matrices
from keras_blockwise.blocking.partition import Partition

Tensor = Any
StepSize = Callable[[Tensor], Tensor]
# `t -> (low, high)`, between which step sizes stay.
Bounds = Callable[[Tensor], tuple[Tensor, Tensor]]

# Most entries of a block: of more, libraries decompose no batches.
LARGEST = 32
# Eigenvalues count as at least so much of their sum: float32, and XLA in any
# dtype, tells no smaller ones from 0.
LEAST = 2.0**-23
# In so many steps each draw of layers is another one; then they repeat.
ROUND = 1024
# The largest seed that NumPy takes.
LAST_SEED = 2**32 - 1


class MatrixMoments(NamedTuple):
    """Which matrices a step decomposes.

    Args:
        layers_per_step: Of how many variables, drawn anew in each step; the
            others use the diagonals alone. `None` for all.
        seed: What the draws are made from.
    """

    layers_per_step: int | None
    seed: int

    def turns(self, variables: Collection[int]) -> dict[int, np.ndarray]:
        """In which steps of a round each is drawn; nothing if all always are.

        A table, so that it is the same on all backends, devices and workers.
        """
        if self.layers_per_step is None:
            return {}
        # Its numbers are those of any version of NumPy.
        random = np.random.RandomState(self.seed)
        numbers = random.random_sample((ROUND, len(variables)))
        drawn = np.argsort(numbers.T, axis=0) < self.layers_per_step
        return dict(zip(variables, drawn))


def columns_of(partition: Partition) -> Matrices | None:
    """The blocks as columns; `None` where they are single entries, or none."""
    if partition.block_shape is None or partition.block_size == 1:
        return None
    axes = tuple(range(len(partition.shape)))
    return Matrices(partition.shape, partition.tile, axes)


def check_blocks(path: str, partition: Partition) -> None:
    """Raises an error if the matrices of a variable would be too large."""
    if partition.block_shape is not None and partition.block_size > LARGEST:
        raise ValueError(
            f"The blocks of variable {path!r} must have at most {LARGEST} "
            "entries, since each has a matrix of second moments. Received: "
            f"blocks of {partition.block_shape}, {partition.block_size} "
            'entries. Use `blocking="adablock"`, or give the path a smaller '
            'tuple or `"coordinate"` in the `rules` of a `Blocking`.'
        )


def bounds(final: float, gamma: float, beta_1: float) -> Bounds:
    """Bounds that close in on `final`, by which SGD with momentum is reached.

    They are for a momentum as it is before its bias correction.
    """

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        end = final * one_minus_power(beta_1, t)
        x = gamma * t
        return end * (x / (x + 1.0)), end * (1.0 + 1.0 / x)

    return at


def accumulated(decay: Tensor, weight: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The second moments `v` after a step with the columns `g`."""
    return decay * v + weight * (g * transposed(g))


def directions(
    step_size: StepSize,
    vs: Sequence[Tensor],
    xs: Sequence[Tensor],
    turns: Sequence[Tensor],
) -> Sequence[Tensor]:
    """The direction of each variable, of shape `(count, n, 1)` as `xs` are.

    Args:
        step_size: That of a second moment.
        vs: Matrices of shape `(count, n, n)`.
        xs: Columns.
        turns: Whether to decompose those of each; nothing for all of them.
    """

    def by_matrix(v: Tensor, x: Tensor) -> Tensor:
        return rotated(step_size, v, x)

    def drawn(turn: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return ops.cond(
            turn,
            lambda: by_matrix(v, x),
            lambda: step_size(diagonal(v)) * x,
        )

    if turns:
        return list(map(drawn, turns, vs, xs))
    return together(by_matrix, vs, xs)


def rotated(step_size: StepSize, v: Tensor, x: Tensor) -> Tensor:
    """`Q diag(step_size(S)) Q^T x`.

    Without a least eigenvalue, what is rounded in `x` would be divided by
    `epsilon` alone.
    """
    total = ops.sum(diagonal(v), axis=1, keepdims=True)
    # Some libraries raise an error for what is not finite.
    usable = ops.isfinite(total)
    s, q = ops.linalg.eigh(ops.where(usable, v, ops.zeros_like(v)))
    s = ops.expand_dims(s, 2)
    least = LEAST * total
    s = ops.where(ops.logical_and(usable, s < least), least, s)
    # With an infinite moment there is no step, as for single entries.
    s = ops.where(usable, s, total)
    # Not by products of matrices, of which accelerators round the factors.
    along = ops.sum(q * x, axis=1, keepdims=True)
    return ops.sum(
        q * (transposed(step_size(s)) * along), axis=2, keepdims=True
    )


def diagonal(v: Tensor) -> Tensor:
    return ops.expand_dims(ops.diagonal(v, axis1=1, axis2=2), 2)
