"""Matrices made orthogonal: Newton-Schulz, and variables seen as matrices."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_blockwise.algorithm.blocks import reshape
from keras_blockwise.blocking.partition import Matrices

Tensor = Any
# `(matrices, exact) -> matrices`, all of shape `(count, rows, columns)`.
# `exact` says that products have the precision of their dtype.
MatrixFunction = Callable[[Tensor, bool], Tensor]

# Of each iteration `x <- (a + b * x x^T + c * (x x^T)^2) x`.
A, B, C = 3.4445, -4.7750, 2.0315
# The root mean square of an update at learning rate 1: that of Adam's.
RMS = 0.2
# Keeps the update of a matrix without a gradient at zero.
TINY = 1e-30


def newton_schulz(steps: int) -> MatrixFunction:
    """The nearest orthogonal matrix, nearly: singular values close to 1.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    def orthogonalize(x: Tensor, exact: bool) -> Tensor:
        if x.shape[1] > x.shape[2]:
            return transposed(orthogonalize(transposed(x), exact))
        gram = x @ transposed(x)
        norm = ops.sqrt(ops.expand_dims(trace(gram), (1, 2))) + 1e-7
        iterate = by_gram if exact and x.shape[2] > x.shape[1] else by_matrix
        return iterate(x / norm, gram / ops.square(norm), steps)

    return orthogonalize


def by_matrix(x: Tensor, gram: Tensor, steps: int) -> Tensor:
    """The iterations as they are written; `gram` is `x x^T`."""
    # `ops.matmul` makes float32 of float64 on PyTorch.
    for step in range(steps):
        if step:
            gram = x @ transposed(x)
        square = gram @ gram
        x = A * x + (B * gram + C * square) @ x
    return x


def by_gram(x: Tensor, gram: Tensor, steps: int) -> Tensor:
    """The iterations on `x x^T` alone, and one product with `x` at the end.

    Fewer multiplications where there are more columns than rows. But it squares
    the singular values, which few digits of a product do not hold.
    """
    diagonal = A * ops.eye(gram.shape[1], dtype=gram.dtype)
    factors = None
    for step in range(steps):
        factor = diagonal + B * gram + C * (gram @ gram)
        factors = factor if factors is None else factor @ factors
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return factors @ x


def transposed(x: Tensor) -> Tensor:
    return ops.transpose(x, (0, 2, 1))


def trace(x: Tensor) -> Tensor:
    return ops.sum(ops.diagonal(x, axis1=1, axis2=2), axis=-1)


def to_matrices(x: Tensor, matrices: Matrices) -> Tensor:
    """A variable as a tensor of `matrices.matrix_shape`."""
    if is_transposed(matrices):
        x = ops.transpose(reshape(x, matrices.view_shape), matrices.order)
    return reshape(x, matrices.matrix_shape)


def from_matrices(x: Tensor, matrices: Matrices) -> Tensor:
    """The inverse of `to_matrices`."""
    if is_transposed(matrices):
        view, order = matrices.view_shape, matrices.order
        x = reshape(x, [view[axis] for axis in order])
        inverse = sorted(range(len(order)), key=lambda i: order[i])
        x = ops.transpose(x, inverse)
    return reshape(x, matrices.shape)


def is_transposed(matrices: Matrices) -> bool:
    """Whether a reshape alone does not give the matrices."""
    long = [axis for axis in matrices.order if matrices.view_shape[axis] > 1]
    return long != sorted(long)


def together(
    function: Callable[..., Tensor], *arguments: Sequence[Tensor]
) -> Sequence[Tensor]:
    """`function` of all matrices of one shape at once, for each argument."""
    if len(arguments[0]) == 1:
        return [function(*(xs[0] for xs in arguments))]
    count, total = arguments[0][0].shape[0], len(arguments[0])
    new = function(*(ops.concatenate(xs) for xs in arguments))
    return [new[i : i + count] for i in range(0, count * total, count)]
