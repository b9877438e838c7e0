"""Entry-wise updates of variables: whole and in place, or row by row.

XLA emits one loop over memory for every array that it writes on a CPU, and
copies an array whose old values it still needs afterwards.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow.compiler.tf2xla.python import xla

from keras_blockwise.algorithm.eight_bits import Encoding
from keras_blockwise.algorithm.second_moment import Tensors
from keras_blockwise.algorithm.units import BlockUpdate
from keras_blockwise.algorithm.units import EntryUpdate
from keras_blockwise.execution.xla_cpu import sums
from keras_blockwise.execution.xla_cpu.barriers import after

Tensor = Any

# Fewest entries of a row: every row costs the launch of a few kernels.
SHORTEST = 2**13
# Most entries of a row: it must still be in the cache when it is read again.
LONGEST = 2**15
# Smaller variables are not cut into rows.
LARGE = 2**18
# The last binary place of the sum of this and a smaller number is that of 1.
SHIFTER = 1.5 * 2.0**23
SHIFTER_BITS = int(np.float32(SHIFTER).view(np.int32))
# So many variables are updated at once if their momentum is encoded: XLA would
# keep for all of them what it compares, and a gradient leaves the cache between
# the passes over it.
AT_ONCE = 2
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
            of them need all inputs, so that it saves memory traffic.
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


def run(
    blocks: Sequence[BlockUpdate], entries: Sequence[EntryUpdate], cores: int
) -> tuple[list[Tensors], list[Tensors]]:
    """The new statistics of each unit, and the new entries of each unit."""
    entry_at = {
        position: k
        for k, entry in enumerate(entries)
        for position in entry.positions
    }
    statistics: list[Tensors] = []
    step_sizes: dict[int, Tensor] = {}
    fused: dict[int, int] = {}
    for k, block in enumerate(blocks):
        other = entry_at[block.groups[0].positions[0]]
        if is_of_entries(block, entries[other]):
            fused[other] = k
            statistics.append(())
            continue
        step_size, *new = block.function(block.means, *block.statistics)
        step_sizes |= block.by_position(step_size)
        statistics.append(tuple(new))
    passes = [
        fused_pass(blocks[fused[i]], entry)
        if i in fused
        else pass_of(entry, step_sizes)
        for i, entry in enumerate(entries)
    ]
    values = new_values(passes, cores)
    for i, k in fused.items():
        count = len(entries[i].values)
        statistics[k] = tuple(values[i][count:][::-1])
        values[i] = values[i][:count]
    return statistics, [tuple(new) for new in values]


def is_of_entries(block: BlockUpdate, entry: EntryUpdate) -> bool:
    """Whether every entry of one variable is a block, all kept by itself."""
    (group, *others), partition = block.groups, entry.partitions[0]
    return (
        not others
        and group.positions == entry.positions
        and partition.group is None
        and partition.block_size == 1
    )


def pass_of(entry: EntryUpdate, step_sizes: dict[int, Tensor]) -> Pass:
    step_size, g, *values = entry.arguments(step_sizes)
    return Pass(
        entry.function,
        (step_size, g),
        tuple(values),
        can_be_cut(entry, values)
        and len(values) > 1
        and not entry.momentum_of_gradient,
        entry.encoding,
    )


def fused_pass(block: BlockUpdate, entry: EntryUpdate) -> Pass:
    """The update of blocks of one entry in the pass over these entries.

    Otherwise XLA would write the step sizes of all entries to memory. The
    statistics are overwritten last, in reverse: each may depend on those that
    come before it in the rule.
    """
    count = len(entry.values)

    def function(g: Tensor, *values: Tensor) -> list[Tensor]:
        means = block.averaged(g, *values[1:count])
        old = values[count:][::-1]
        step_size, *new = block.function(means, *old)
        # Keeps TensorFlow from reordering the division and the product.
        step_size = ops.reshape(step_size, g.shape)
        return [*entry.function(step_size, g, *values[:count]), *new[::-1]]

    values = (*entry.values, *block.statistics[::-1])
    return Pass(function, (entry.gradient,), values, can_be_cut(entry, values))


def can_be_cut(entry: EntryUpdate, values: Sequence[Tensor]) -> bool:
    """Whether the update is the same for every row, and can be in place.

    The weight decay of several variables may differ, and XLA would copy all of
    a variable that is stored in 16 bits.
    """
    return (
        len(entry.positions) == 1
        and entry.encoding is None
        and all(value.dtype == entry.dtype for value in values)
    )


def new_values(passes: Sequence[Pass], cores: int) -> list[list[Tensor]]:
    """What the variables of each pass are to be."""
    rows = rows_of_each(passes, cores)
    new: list[list[Tensor]] = []
    loops: list[Tensor] = []
    scales: list[Tensor] = []
    for i, one in enumerate(passes):
        if i in rows:
            values, state = new_values_in_rows(one, rows[i])
            loops.append(state)
        elif one.encoding is not None:
            earlier = scales[-AT_ONCE] if len(scales) >= AT_ONCE else None
            values = new_values_encoded(one, one.encoding, earlier)
            scales.append(values[-1])
        else:
            values = new_values_in_place(one)
        new.append(values)
    if loops:
        last = new[smallest(passes)]
        last[0] = after(tf.add_n(loops), last[0])
    return new


def merging_axes(one: Pass) -> int:
    """How many leading axes can be merged into one for every tensor.

    Along all of them, an input has one entry or as many as the variables.
    """
    spans = None
    for axis, n in enumerate(one.shape):
        here = [x.shape[axis] == n for x in one.inputs]
        if n > 1 and here != (spans := spans or here):
            return axis
    return len(one.shape)


def rows_of(one: Pass) -> int:
    """How many rows to cut the variables into; 1 if that gains nothing."""
    if not one.in_rows or one.size < LARGE:
        return 1
    along = math.prod(one.shape[: merging_axes(one)])
    few, many = -(-one.size // LONGEST), one.size // SHORTEST
    return next((n for n in range(few, many + 1) if along % n == 0), 1)


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


def new_values_in_place(one: Pass) -> list[Tensor]:
    """The new values of the variables, without temporary memory of their size.

    XLA would copy a 16-bit momentum, whose old values the weights need. And if
    every entry is a block, it would write the scaled gradient to memory, which
    weights and momentum need. So each value is computed after the one before.
    """
    (*inputs, gradient), values = one.inputs, one.values
    wide = all(value.dtype.size > 2 for value in values)
    if len(values) < 3 and wide:
        return list(one.function(*one.inputs, *values))
    new = []
    for i, value in enumerate(values):
        computed = one.function(*inputs, gradient, *values)[i]
        new.append(tf.cast(computed, value.dtype))
        gradient = after(new[i], gradient)
    return new


def new_values_encoded(
    one: Pass, encoding: Encoding, earlier: Tensor | None
) -> list[Tensor]:
    """The new weights, and the codes and scales of the new momentum.

    The momentum is computed three times, from codes that are in memory until
    the new ones are: for the weights, for the scales and for the codes. XLA
    would else write all of it to memory.

    Args:
        one: The update.
        encoding: How the momentum is kept.
        earlier: What to wait for.
    """
    (*inputs, gradient), values = one.inputs, one.values
    if earlier is not None:
        gradient = after(earlier, gradient)
    w, _ = one.function(*inputs, gradient, *values)
    w = tf.cast(w, values[0].dtype)
    gradient = after(w, gradient)
    _, m = one.function(*inputs, gradient, *values)
    largest = sums.largest_of(m, encoding.groups)
    gradient = after(largest, gradient)
    _, m = one.function(*inputs, gradient, *values)
    return [w, *encoding.encode_by(largest, m, nearest)]


def nearest(x: Tensor) -> Tensor:
    """As in `rounding`, of numbers below 2^22.

    XLA's conversion would also limit them to those of int32.
    """
    return tf.bitcast(x + SHIFTER, tf.int32) - SHIFTER_BITS


def new_values_in_rows(one: Pass, rows: int) -> tuple[list[Tensor], Tensor]:
    """The new values, computed row by row, and a scalar that depends on them.

    XLA runs loops concurrently if none reuses the memory of another. So all
    that this loop computes is in its state, which the scalar depends on: while
    the scalar is still to be read, nobody else gets the memory.
    """
    inputs = [cut(x, rows, one) for x in one.inputs]
    values = [cut(v, rows, one) for v in one.values]

    def update_row(row: Tensor, _: Tensor, __: Tensor, values: Any) -> Any:
        index, values = tf.cast(row, tf.int32), list(values)
        entries = [at(x, index) for x in (*inputs, *values)]
        for i, value in enumerate(values):
            values[i] = xla.dynamic_update_slice(
                value,
                one.function(*entries)[i],
                [index] + [0] * (value.shape.rank - 1),
            )
            written = at(values[i], index)
            if i + 1 < len(values):
                # XLA writes in place what is not read afterwards.
                index = after(written, index)
                entries[len(inputs) + i + 1] = at(values[i + 1], index)
        # A division: XLA would compute a sum twice, and copy the row.
        following = (row + 1) / after(written, tf.ones_like(row))
        return following, following, following < rows, values

    start = tf.constant(0.0), tf.constant(-1.0), tf.constant(True)
    row, following, more, values = tf.while_loop(
        lambda row, _, more, values: more, update_row, (*start, values)
    )
    return list(values), row + following + tf.cast(more, row.dtype)


def cut(tensor: Tensor, rows: int, one: Pass) -> Tensor:
    """The tensor as rows; a single one if it is constant along these axes."""
    axes = merging_axes(one)
    n = math.prod(tensor.shape[:axes])
    first = (rows, n // rows) if n > 1 else (1, 1)
    return tf.reshape(tensor, (*first, *tensor.shape[axes:]))


def at(tensor: Tensor, row: Tensor) -> Tensor:
    """A row of a tensor, or its only one."""
    if tensor.shape[0] == 1:
        return tensor
    # Keeps the axis: XLA writes a row of the same shape back in place.
    return tf.gather(tensor, [row])
