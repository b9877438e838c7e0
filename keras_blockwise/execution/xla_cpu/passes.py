"""Entry-wise updates of variables: whole and in place, or row by row.

XLA emits one loop over memory for every array that it writes on a CPU, and
copies an array whose old values it still needs afterwards.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from keras import ops

from keras_blockwise.algorithm.second_moment import Tensors
from keras_blockwise.algorithm.units import BlockUpdate
from keras_blockwise.algorithm.units import EntryUpdate
from keras_blockwise.execution.xla_cpu import encoded
from keras_blockwise.execution.xla_cpu.barriers import after
from keras_blockwise.execution.xla_cpu.rows import Pass
from keras_blockwise.execution.xla_cpu.rows import at
from keras_blockwise.execution.xla_cpu.rows import cut
from keras_blockwise.execution.xla_cpu.rows import row_by_row
from keras_blockwise.execution.xla_cpu.rows import rows_of_each
from keras_blockwise.execution.xla_cpu.rows import smallest
from keras_blockwise.execution.xla_cpu.rows import write

Tensor = Any


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
    several = len(values) > 1 and not entry.momentum_of_gradient
    return Pass(
        entry.function,
        (step_size, g),
        tuple(values),
        can_be_cut(entry, values) and (several or entry.encoding is not None),
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
    return len(entry.positions) == 1 and all(
        value.dtype == entry.dtype for value in values
    )


def new_values(passes: Sequence[Pass], cores: int) -> list[list[Tensor]]:
    """What the variables of each pass are to be."""
    rows = rows_of_each(passes, cores)
    new: list[list[Tensor]] = []
    loops: list[Tensor] = []
    scales: list[Tensor] = []
    for i, one in enumerate(passes):
        if i in rows:
            values, end = new_values_in_rows(one, rows[i])
            loops.append(end)
        elif one.encoding is not None:
            values = encoded.whole(one, one.encoding, scales)
            scales.append(values[-1])
        else:
            values = new_values_in_place(one)
        new.append(values)
    if loops:
        last = new[smallest(passes)]
        last[0] = after(tf.add_n(loops), last[0])
    return new


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


def new_values_in_rows(one: Pass, rows: int) -> tuple[list[Tensor], Tensor]:
    """The new values, computed row by row, and a scalar as of `row_by_row`."""
    if one.encoding is not None:
        return encoded.in_rows(one, one.encoding, rows)
    inputs = [cut(x, rows, one) for x in one.inputs]

    def update_row(
        index: Tensor, old: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor]:
        values = list(old)
        entries = [at(x, index) for x in (*inputs, *values)]
        for i, value in enumerate(values):
            values[i] = write(value, one.function(*entries)[i], index)
            written = at(values[i], index)
            if i + 1 < len(values):
                # XLA writes in place what is not read afterwards.
                index = after(written, index)
                entries[len(inputs) + i + 1] = at(values[i + 1], index)
        return values, written

    return row_by_row(rows, update_row, [cut(v, rows, one) for v in one.values])
