"""Partial sums on a CPU: the numbers of plain sums, and where they are used."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_blockwise as kb
from helpers.programs import all_nodes
from keras_blockwise.algorithm import eight_bits
from keras_blockwise.algorithm.eight_bits import Groups
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.execution import tensorflow
from keras_blockwise.execution.xla_cpu.sums import LANES
from keras_blockwise.execution.xla_cpu.sums import MOST_TERMS
from keras_blockwise.execution.xla_cpu.sums import SMALL
from keras_blockwise.execution.xla_cpu.sums import block_sum
from keras_blockwise.execution.xla_cpu.sums import largest_of
from keras_blockwise.execution.xla_cpu.sums import row_terms
from keras_blockwise.execution.xla_cpu.sums import terms_and_distance

pytestmark = pytest.mark.tensorflow
# Square, odd and prime extents of rank 1 to 5, and what XLA might join.
SHAPES = [
    ((4096,), (4096,)),
    ((9973,), (9973,)),
    ((8192,), (64,)),
    ((64, 64), (64, 1)),
    ((64, 64), (1, 64)),
    ((64, 64), (64, 64)),
    ((256, 1024), (256, 1)),
    ((257, 263), (257, 1)),
    ((257, 263), (1, 263)),
    ((257, 263), (257, 263)),
    ((1733, 3), (1733, 1)),
    ((1733, 3), (1, 3)),
    ((33, 128), (33, 1)),
    ((128, 33), (1, 33)),
    ((2310, 7), (1155, 1)),
    ((96, 12, 64), (96, 1, 64)),
    ((12, 96, 64), (1, 96, 1)),
    ((67, 11, 13), (67, 1, 13)),
    ((3, 3, 64, 64), (3, 3, 64, 1)),
    ((3, 3, 64, 64), (3, 3, 1, 64)),
    ((3, 3, 64, 64), (3, 3, 1, 1)),
    ((2, 3, 5, 7, 41), (2, 3, 5, 7, 1)),
    ((2, 3, 5, 7, 41), (1, 3, 1, 7, 41)),
]
each_shape = pytest.mark.parametrize("shape, block_shape", SHAPES, ids=str)


def plain_sum(x, p):
    """By NumPy, over the axes within a block."""
    pairs = [n for pair in zip(p.grid, p.block_shape) for n in pair]
    inside = tuple(range(1, 2 * len(p.shape), 2))
    return x.reshape(pairs).sum(inside)


@each_shape
def test_parts_have_the_sum_of_the_whole(shape, block_shape):
    p = Partition(shape, block_shape)
    x = np.random.default_rng(0).normal(size=shape)

    @tf.function(jit_compile=True)
    def sum_of_squares(x):
        return block_sum(tf.square(x), p)

    for dtype, tolerance in (("float64", 1e-13), ("float32", 1e-6)):
        x = x.astype(dtype)
        actual = sum_of_squares(tf.constant(x))
        assert actual.dtype == dtype
        expected = plain_sum(np.square(x, dtype="float64"), p)
        np.testing.assert_allclose(actual, expected, tolerance)


@each_shape
def test_the_largest_of_parts_is_that_of_the_whole(shape, block_shape):
    groups = Groups.of(Partition(shape, block_shape))
    x = np.random.default_rng(0).normal(size=shape).astype("float32")

    @tf.function(jit_compile=True)
    def largest(x):
        return largest_of(x, groups)

    expected = eight_bits.largest_of(tf.constant(x), groups)
    np.testing.assert_array_equal(largest(tf.constant(x)), expected)


@each_shape
def test_parts_are_short_and_leave_many(shape, block_shape):
    p = Partition(shape, block_shape)
    for axis in p.view_axes:
        n = p.view_shape[axis]
        width = int(np.prod(p.view_shape[axis + 1 :]))
        terms, distance = terms_and_distance(n, width)
        assert 1 <= terms <= MOST_TERMS
        assert 1 <= distance <= n // terms
        # XLA joins loops of no more than that, and both become slow.
        assert terms == 1 or n // (terms * distance) * distance > MOST_TERMS
        assert terms > 1 or n < 2 * (MOST_TERMS + LANES)


@pytest.mark.parametrize(
    "n, width, expected",
    [
        (768, 3072, (16, 1)),  # 24 would leave 32.
        (4608, 512, (32, 2)),
        (1152, 128, (24, 8)),
        (997, 10_000, (24, 1)),  # With a rest.
        (2**16, 1, (32, 8)),  # One term right after the other.
        (7 * 7 * 3 * 64, 1, (32, 8)),  # With a rest, but not 14 apart.
        (25 * 2**8, 3, (32, 3)),
        (1728, 64, (32, 2)),  # 9 would divide 54.
        (64, 64, (1, 1)),
    ],
)
def test_terms_and_distance(n, width, expected):
    assert terms_and_distance(n, width) == expected


@pytest.mark.parametrize(
    "n, expected", [(768, 32), (64, 8), (100, 10), (97, 1), (12, 1)]
)
def test_row_terms(n, expected):
    assert row_terms(n) == expected
    assert expected == 1 or n // expected >= LANES


def barriers(optimizer, shape):
    """How many partial sums the update of one variable has."""
    with keras.name_scope("dense"):
        kernel = keras.Variable(np.ones(shape, "float32"), name="kernel")
    optimizer.build([kernel])

    @tf.function(autograph=False)
    def update(gradient):
        optimizer.apply([gradient])

    graph = update.get_concrete_function(tf.zeros(shape)).graph.as_graph_def()
    operations = [node.op for node in all_nodes(graph)]
    return operations.count("XlaOptimizationBarrier")


def test_only_large_variables_of_xla_on_a_cpu_have_partial_sums(monkeypatch):
    kernel = (SMALL // 16, 16)
    monkeypatch.setattr(tensorflow, "LARGE", 0)
    assert barriers(kb.BlockAdam(), kernel) == 1
    assert barriers(kb.BlockRMSprop(centered=True), kernel) == 2
    assert barriers(kb.BlockAdam(blocking="coordinate"), kernel) == 0
    assert barriers(kb.BlockAdam(), (SMALL // 16 - 1, 16)) == 0
    assert barriers(kb.BlockAdam(jit_compile=False), kernel) == 0
    monkeypatch.setattr(tensorflow, "FOR_CPU", tensorflow.PLAIN)
    assert barriers(kb.BlockAdam(), kernel) == 0


@pytest.mark.parametrize(
    "devices, expected",
    [
        (["/device:CPU:0"], True),
        (["/job:localhost/replica:0/task:0/device:CPU:1", "/CPU:0"], True),
        (["/device:GPU:0"], False),
        (["/device:TPU:0"], False),
        (["/device:CPU:0", "/device:GPU:0"], False),
    ],
)
def test_where_the_tricks_are_taken(devices, expected):
    kernels = tensorflow.kernels_on(set(devices))
    assert (kernels is tensorflow.FOR_CPU) == expected
