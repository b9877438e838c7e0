"""Entry-wise updates of variables with a momentum in 8 bits.

The momentum is computed three times, from codes that are in memory until the
new ones are: for the weights, for the scales and for the codes. XLA would else
write all of it to memory.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_blockwise.algorithm import eight_bits
from keras_blockwise.algorithm.blocks import reshape
from keras_blockwise.algorithm.eight_bits import Encoding
from keras_blockwise.execution.xla_cpu import sums
from keras_blockwise.execution.xla_cpu.barriers import after
from keras_blockwise.execution.xla_cpu.rows import Pass
from keras_blockwise.execution.xla_cpu.rows import at
from keras_blockwise.execution.xla_cpu.rows import cut
from keras_blockwise.execution.xla_cpu.rows import row_by_row
from keras_blockwise.execution.xla_cpu.rows import terms_of
from keras_blockwise.execution.xla_cpu.rows import write

Tensor = Any

# So many whole variables are updated at once: XLA would keep for all of them
# what it compares, and a gradient leaves the cache between the passes over it.
AT_ONCE = 2
# The last binary place of the sum of this and a smaller number is that of 1.
SHIFTER = 1.5 * 2.0**23
SHIFTER_BITS = int(np.float32(SHIFTER).view(np.int32))


def whole(
    one: Pass, encoding: Encoding, scales: Sequence[Tensor]
) -> list[Tensor]:
    """The new weights, and the codes and scales of the new momentum.

    Args:
        one: The update.
        encoding: How its momentum is kept.
        scales: Those of the variables before it, each of which is computed
            after all else of the variable but the codes.
    """
    *inputs, gradient = one.inputs

    def new(before: Tensor | None) -> Sequence[Tensor]:
        g = gradient if before is None else after(before, gradient)
        return one.function(*inputs, g, *one.values)

    w = new(scales[-AT_ONCE] if len(scales) >= AT_ONCE else None)[0]
    w = tf.cast(w, one.values[0].dtype)
    largest = sums.largest_of(new(w)[1], encoding.groups)
    factors = eight_bits.factors(largest)
    codes = encoding.codes(new(largest)[1], factors, nearest)
    return [w, codes, eight_bits.scales(largest)]


def in_rows(
    one: Pass, encoding: Encoding, rows: int
) -> tuple[list[Tensor], Tensor]:
    """As `whole`, computed row by row, and a scalar as of `row_by_row`."""
    inputs = [cut(x, rows, one) for x in one.inputs]
    seeds = [cut(x, rows, one) for x in encoding.seeds]
    codes, scales = encoding.kept
    w, codes = (cut(x, rows, one) for x in (one.values[0], codes))
    groups = encoding.groups.of_row((1, *w.shape[1:]))
    terms = terms_of(groups)

    def update_row(
        index: Tensor, old: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor]:
        w, codes, scales, *_ = old

        def new(index: Tensor) -> Sequence[Tensor]:
            m = eight_bits.decode(at(codes, index), at(scales, index), groups)
            return one.function(*(at(x, index) for x in (*inputs, w)), m)

        w = write(w, new(index)[0], index)
        later = after(at(w, index), index)
        parts = sums.largest_in_parts(new(later)[1], groups, terms)
        largest = sums.largest_of_parts(parts, groups)
        factors = eight_bits.factors(largest)
        later = after(factors, index)
        row = Encoding(groups, tuple(at(x, later) for x in seeds))
        row_codes = row.codes(new(later)[1], factors, nearest)
        codes = write(codes, row_codes, later)
        later = after(tf.cast(at(codes, index), "float32"), index)
        scales = write(scales, eight_bits.scales(largest)[None], later)
        made = parts, largest, factors
        return (w, codes, scales, *made), at(scales, index)

    scales = reshape(scales, (rows, *groups.scale_shape))
    before, after_terms = sums.axes_of_parts(groups, terms)
    parts = tf.zeros((*before, *after_terms))
    largest = factors = tf.zeros(groups.scale_shape)
    (w, codes, scales, *made), end = row_by_row(
        rows, update_row, (w, codes, scales, parts, largest, factors)
    )
    for tensor in made:
        end = end + tf.reshape(tensor, [-1])[0]
    return [w, codes, scales], end


def nearest(x: Tensor) -> Tensor:
    """As in `rounding`, of numbers below 2^22.

    XLA's conversion would also limit them to those of int32.
    """
    return tf.bitcast(x + SHIFTER, tf.int32) - SHIFTER_BITS
