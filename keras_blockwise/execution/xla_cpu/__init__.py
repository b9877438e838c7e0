"""What makes XLA fast on a CPU, behind the interface of `PlainKernels`.

Nothing here changes a number but for the order in which terms are added up.
Each trick, what it gains of a compiled step on two cores of an AMD EPYC, and
the command that shows it (change the constant named, and run it again):

trick                            gains                         shown by
-------------------------------  ----------------------------  -----------------
sums in parts of 32 terms        sums 2 to 11 times as fast    benchmarks.sums
`sums.MOST_TERMS`
sums read along with momenta     ResNet-50, BlockAdam: 0.66    benchmarks.step
`sums.read_along`                of Adam's step, else 0.80
variables row by row, several    GPT-2, BAGM: 0.65 to 0.69 of  benchmarks.step
at once, `rows.LARGE`            Adam's step, whole 0.84
the same with 8 bits,            GPT-2: 1.08 to 1.13 of the    benchmarks.step
`rows.LONGEST_OF_GROUPS`         step with 32, whole 1.33;     (`int8`)
                                 ResNet-50: 1.01 to 1.10,
                                 whole 1.32
integers without their limits,   ResNet-50: 0.74 of Adam's     benchmarks.step
`encoded.nearest`                step, else 0.81               (`int8`)
blocks of one entry within the   1024 x 1024 by entry, BAGM:   benchmarks.step
pass over them, `passes.run`     1.9 of Adam's step, else 4.6  (`coordinate`)
momentum of 16 bits in place,    no copy of the momentum       benchmarks.memory
`passes.new_values_in_place`
all but a few variables before   `model.fit`, compiled, 0.96    benchmarks.fit
the last gradient, and short     to 0.98 of Adam's step, else  (with `LARGE = 0`
gradients joined, `calls`        0.98 to 1.01                  in `tensorflow`)
matrices one by one, on x x^T    two blocks of GPT-2: 0.59 of  benchmarks.step
alone, `ALONE`                   the step of Keras's Muon      (`muon`)

With 8 bits where variables stay whole, as with `rows.LONGEST_OF_GROUPS = 0`:

trick                            gains                         shown by
-------------------------------  ----------------------------  -----------------
two of them at once,             ResNet-50: a peak of 0.084    benchmarks.memory
`encoded.AT_ONCE`                of the parameters; for all
                                 at once 0.25
the largest in parts of 4,       ResNet-50: 0.95 of Adam's     benchmarks.step
`sums.COMPARED`                  step, else (16) 1.18          (`int8`)
of neighbours in parts of 8,     GPT-2: a peak of 0.046 of     benchmarks.memory
`sums.NEIGHBOURS_COMPARED`       the parameters, else 0.084
"""

import os
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_blockwise.algorithm.orthogonal import MatrixFunction
from keras_blockwise.algorithm.orthogonal import together
from keras_blockwise.algorithm.second_moment import Tensors
from keras_blockwise.algorithm.units import BlockUpdate
from keras_blockwise.algorithm.units import EntryUpdate
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.execution.plain import PlainKernels
from keras_blockwise.execution.xla_cpu import calls
from keras_blockwise.execution.xla_cpu import passes
from keras_blockwise.execution.xla_cpu import sums

Tensor = Any

# Matrices with as many entries are multiplied one by one, not copied together.
ALONE = 2**18


class XlaCpuKernels(PlainKernels):
    """How to compute a step that XLA compiles for a CPU."""

    def block_sums(
        self,
        averaged: Callable[[Tensor], Tensors],
        g: Tensor,
        w: Tensor,
        partition: Partition,
    ) -> Tensors:
        g = sums.read_along(g, w, partition)
        return tuple(sums.block_sum(x, partition) for x in averaged(g))

    def of_matrices(
        self, function: MatrixFunction, xs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        def exact(x: Tensor) -> Tensor:
            return function(x, True)

        if xs[0].shape.num_elements() < ALONE:
            return together(exact, xs)
        return [exact(x) for x in xs]

    def run(
        self, blocks: Sequence[BlockUpdate], entries: Sequence[EntryUpdate]
    ) -> tuple[list[Tensors], Any]:
        cores = tf.config.threading.get_intra_op_parallelism_threads()
        return passes.run(blocks, entries, cores or os.cpu_count() or 1)

    def calls(self, accumulators: Sequence[Any]) -> list[slice]:
        # Backwards, as gradients are made.
        return calls.first_and_rest(accumulators)[::-1]

    def pack(
        self, gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], list[Tensor]]]:
        positions = calls.short_vectors(gradients)
        return (
            calls.join_vectors(gradients, positions),
            calls.splitter(gradients, positions),
        )
