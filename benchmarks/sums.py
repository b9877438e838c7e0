"""Sums of squares over blocks: in parts, as the step has them, or plain.

    python -m benchmarks.sums

For each shape a block is the whole, the numbers of a column, or those of a row,
as they stand in memory. One call sums gradients of at least 10 million numbers
in all.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks import report
from benchmarks import timing
from keras_blockwise.algorithm.second_moment import squares
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.execution import tensorflow
from keras_blockwise.execution.plain import PlainKernels

NUMBERS = 10_000_000
# Shape and block: dense and convolution kernels, embeddings, odd ones.
CASES = (
    ((768, 3072), (768, 3072)),
    ((3, 3, 256, 256), (3, 3, 256, 256)),
    ((768, 3072), (768, 1)),
    ((2048, 1000), (2048, 1)),
    ((1733, 997), (1733, 1)),
    ((3, 3, 256, 256), (3, 3, 256, 1)),
    ((3, 3, 512, 512), (3, 3, 512, 1)),
    ((7, 7, 3, 64), (7, 7, 3, 64)),
    ((3, 3, 3, 64, 64), (3, 3, 3, 64, 1)),
    ((8192, 768), (1, 768)),
    ((65536, 64), (1, 64)),
)


def sum_squares(
    gradients: list[Any], partition: Partition, kernels: PlainKernels
) -> list[Any]:
    return [
        kernels.block_sums(squares, gradient, gradient, partition)
        for gradient in gradients
    ]


def make_sums(
    partition: Partition, count: int
) -> dict[str, Callable[[], object]]:
    """Functions that sum the squares of as many gradients."""
    rng = np.random.default_rng(0)
    gradients = [
        tf.constant(rng.standard_normal(partition.shape, np.float32))
        for _ in range(count)
    ]
    kernels = {"plain": tensorflow.PLAIN, "in parts": tensorflow.FOR_CPU}
    return {
        name: tf.function(
            partial(sum_squares, gradients, partition, own),
            jit_compile=True,
            autograph=False,
        )
        for name, own in kernels.items()
    }


def main() -> None:
    args = report.make_parser(__doc__ or "", rounds=20).parse_args()
    rows = []
    results = []
    bars: report.Bars = {}
    with timing.progress_bar() as progress:
        for shape, block in CASES:
            size = math.prod(shape)
            count = math.ceil(NUMBERS / size)
            name = f"{shape} by {block}"
            times = timing.interleave_steps(
                make_sums(Partition(shape, block), count),
                args.rounds,
                progress,
                name,
            )
            speeds = {
                how: 4 * size * count / seconds / 1e9
                for how, seconds in timing.medians(times).items()
            }
            ratio = speeds["in parts"] / speeds["plain"]
            rows.append(
                (
                    str(shape),
                    str(block),
                    *(f"{speed:.1f}" for speed in speeds.values()),
                    f"{ratio:.1f}×",
                )
            )
            results.append({"shape": shape, "block": block, "seconds": times})
            bars[name] = (ratio, f"{ratio:.1f}×", True)
    title = "Sums of squares over blocks"
    columns = ("shape", "block", "plain, GB/s", "in parts, GB/s", "faster")
    report.console.print(report.make_table(title, columns, rows))
    path = args.output / "sums.json"
    report.save(path, args, results, [])
    report.draw_bars(
        path.with_suffix(".png"),
        title,
        "speed in parts / speed of plain sums",
        {"compiled by XLA": bars},
    )


if __name__ == "__main__":
    main()
