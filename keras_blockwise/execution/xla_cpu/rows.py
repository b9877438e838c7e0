"""Variables row by row: how many rows, and a loop over them.

A row is in the cache when it is read again, and the loops of several variables
run at the same time: one core computes while another one waits for memory.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from keras_blockwise.algorithm.eight_bits import Encoding
from keras_blockwise.algorithm.eight_bits import Groups
from keras_blockwise.execution.xla_cpu.barriers import after
from keras_blockwise.execution.xla_cpu.sums import MOST_TERMS

Tensor = Any

# Fewest entries of a row: every row costs the launch of a few kernels.
SHORTEST = 2**13
# Most entries of a row: it must still be in the cache when it is read again.
LONGEST = 2**15
# The same if a row must have whole groups of a momentum in 8 bits.
LONGEST_OF_GROUPS = 2**20
# Smaller variables are not cut into rows.
LARGE = 2**18
# XLA runs loops concurrently on at most this many cores.
MOST_CORES = 4
# Fewest loops per core: XLA's workers steal loops while more than eight wait.
PER_CORE = 8


class Pass(NamedTuple):
    """An entry-wise update of variables of one shape.

    Args:
        function: `(*inputs, *values) -> new values`, for any entries of them.
            A new value does not depend on the values before it in the list, so
            that they can be overwritten in this order.
        inputs: Tensors that broadcast to the shape; the gradient is the last.
        values: The variables before the step.
        in_rows: Whether to cut the variables into rows: possible, and several
            loops read all inputs, so that it saves memory traffic.
        encoding: How the second value is kept, if not as numbers.
    """

    function: Callable[..., Sequence[Tensor]]
    inputs: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    in_rows: bool
    encoding: Encoding | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values[0].shape)

    @property
    def size(self) -> int:
        """How many entries the variables have."""
        return math.prod(self.shape)


def merging_axes(one: Pass) -> int:
    """How many leading axes can be merged into one for every tensor.

    Along all of them, an input has one entry or as many as the variables.
    """
    seeds = one.encoding.seeds if one.encoding is not None else ()
    spans = None
    for axis, n in enumerate(one.shape):
        here = [x.shape[axis] == n for x in (*one.inputs, *seeds)]
        if n > 1 and here != (spans := spans or here):
            return axis
    return len(one.shape)


def rows_of(one: Pass) -> int:
    """How many rows to cut the variables into; 1 if that gains nothing."""
    if not one.in_rows or one.size < LARGE:
        return 1
    along = math.prod(one.shape[: merging_axes(one)])
    many = one.size // SHORTEST
    if one.encoding is not None:
        return rows_of_groups(one.encoding.groups, along, many)
    few = -(-one.size // LONGEST)
    return next((n for n in range(few, many + 1) if along % n == 0), 1)


def rows_of_groups(groups: Groups, along: int, many: int) -> int:
    """As many rows as possible that have whole groups, or 1.

    Args:
        groups: The groups of the variable.
        along: The number of rows divides this one.
        many: There are at most so many rows.
    """
    if groups.view[groups.axis] % groups.size or not terms_of(groups):
        return 1
    most = math.gcd(along, groups.stretches)
    rows = next(n for n in range(min(many, most), 0, -1) if most % n == 0)
    size = math.prod(groups.shape) // rows
    return rows if size <= LONGEST_OF_GROUPS else 1


def terms_of(groups: Groups) -> int:
    """Of how many entries to compute the largest one at once; 0 if of none.

    So many that XLA computes the largest of these in one more loop.
    """
    few = -(-groups.size // MOST_TERMS)
    return next((k for k in range(few, 2 * few + 1) if groups.size % k == 0), 0)


def smallest(passes: Sequence[Pass]) -> int:
    """The position of the smallest pass."""
    return min(range(len(passes)), key=lambda i: passes[i].size)


def rows_of_each(passes: Sequence[Pass], cores: int) -> dict[int, int]:
    """The number of rows of each pass that is cut, by its position.

    The smallest pass is not cut: it waits for the loops of the others.
    """
    cores = min(cores, MOST_CORES)
    # The loop of a larger one would still run when all others have ended.
    most = sum(one.size for one in passes) / cores
    last = smallest(passes)
    rows = {
        i: rows_of(one)
        for i, one in enumerate(passes)
        if i != last and one.size <= most
    }
    rows = {i: n for i, n in rows.items() if n > 1}
    return rows if len(rows) >= PER_CORE * cores else {}


def row_by_row(
    rows: int,
    update_row: Callable[
        [Tensor, Sequence[Tensor]], tuple[Sequence[Tensor], Tensor]
    ],
    values: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """The new values, and a scalar that depends on them.

    XLA runs loops concurrently if none reuses the memory of another. So all
    that this loop computes is in its state, which the scalar depends on: while
    the scalar is still to be read, nobody else gets the memory.

    Args:
        rows: How many rows the values have.
        update_row: `(index, values) -> values, and the last one to be written`.
        values: Before the loop.
    """

    def update(row: Tensor, _: Tensor, __: Tensor, values: Any) -> Any:
        values, written = update_row(tf.cast(row, tf.int32), values)
        # A division: XLA would compute a sum twice, and copy the row.
        following = (row + 1) / after(written, tf.ones_like(row))
        return following, following, following < rows, list(values)

    start = tf.constant(0.0), tf.constant(-1.0), tf.constant(True)
    row, following, more, values = tf.while_loop(
        lambda row, _, more, values: more, update, (*start, list(values))
    )
    return list(values), row + following + tf.cast(more, row.dtype)


def cut(tensor: Tensor, rows: int, one: Pass) -> Tensor:
    """The tensor as rows; a single one if it is constant along these axes.

    Without an axis of one entry between others: XLA would copy the tensor.
    """
    axes = merging_axes(one)
    along = math.prod(one.shape[:axes])
    is_constant = math.prod(tensor.shape[:axes]) == 1
    first = [1, 1] if is_constant else [rows, along // rows]
    if along == rows:
        del first[1]
    return tf.reshape(tensor, (*first, *tensor.shape[axes:]))


def write(tensor: Tensor, row: Tensor, index: Tensor) -> Tensor:
    """The tensor with this row."""
    start = [index] + [0] * (tensor.shape.rank - 1)
    return xla.dynamic_update_slice(tensor, row, start)


def at(tensor: Tensor, row: Tensor) -> Tensor:
    """A row of a tensor, or its only one."""
    if tensor.shape[0] == 1:
        return tensor
    # Keeps the axis: XLA writes a row of the same shape back in place.
    return tf.gather(tensor, [row])
