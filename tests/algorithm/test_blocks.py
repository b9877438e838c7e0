"""Sums over blocks, and values spread over them, by brute force."""

import keras
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helpers.partitions import corners
from helpers.partitions import examples
from helpers.partitions import integers
from helpers.partitions import partitions
from keras_blockwise.algorithm.blocks import block_mean
from keras_blockwise.algorithm.blocks import block_sum
from keras_blockwise.algorithm.blocks import spread
from keras_blockwise.blocking.partition import Partition


@examples
@given(partitions())
def test_block_sum_is_that_of_brute_force(partition):
    x = integers(partition.shape)
    expected = np.zeros(partition.grid)
    for index, block in corners(partition):
        expected[index] = x[block].sum()
    actual = block_sum(keras.ops.convert_to_tensor(x), partition)
    np.testing.assert_array_equal(actual, expected)


@examples
@given(partitions())
def test_values_spread_is_that_of_brute_force(partition):
    check_spread(partition)


def test_values_spread_of_a_tile_that_splits_three_axes():
    check_spread(Partition((4, 4, 4), (2, 2, 2)))


def test_values_spread_of_blocks_on_every_other_axis():
    """Six factors, which TensorFlow multiplies only where it compiles."""
    check_spread(Partition((2, 3, 2, 3, 2, 3), (2, 1, 2, 1, 2, 1)))


def check_spread(partition):
    x, scale = integers(partition.shape), integers(partition.grid)
    expected = x.copy()
    for index, block in corners(partition):
        expected[block] *= scale[index]
    scale = keras.ops.convert_to_tensor(scale)
    shape, scale = spread([scale], [partition])
    assert len(scale.shape) == len(shape)
    actual = keras.ops.reshape(x, shape) * scale
    actual = keras.ops.reshape(actual, partition.shape)
    np.testing.assert_array_equal(actual, expected)


@examples
@given(st.lists(partitions(max_rank=3), min_size=2, max_size=4))
def test_values_spread_of_joined_variables_is_that_of_each(members):
    scales = [1000.0 * i + integers(p.grid) for i, p in enumerate(members)]
    expected = []
    for partition, scale in zip(members, scales):
        of_entries = np.zeros(partition.shape)
        for index, block in corners(partition):
            of_entries[block] = scale[index]
        expected.append(of_entries.ravel())
    shape, actual = spread(
        [keras.ops.convert_to_tensor(scale) for scale in scales], members
    )
    assert tuple(actual.shape) == shape
    np.testing.assert_array_equal(actual, np.concatenate(expected))


@examples
@given(st.lists(partitions(max_rank=3), min_size=1, max_size=4))
def test_mean_of_a_group_is_that_of_all_its_coordinates(members):
    members = [Partition(p.shape, p.shape, "group") for p in members]
    xs = [integers(p.shape) + k for k, p in enumerate(members)]
    flat = np.concatenate([x.ravel() for x in xs])
    tensors = map(keras.ops.convert_to_tensor, xs)
    mean = block_mean(list(map(block_sum, tensors, members)), members)
    np.testing.assert_allclose(mean, flat.mean(), rtol=1e-14)
