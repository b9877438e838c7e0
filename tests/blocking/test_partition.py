"""A partition is a grid of tiles that covers a shape."""

import math

import numpy as np
import pytest
from hypothesis import given

import keras_blockwise as kb
from helpers.partitions import corners
from helpers.partitions import examples
from helpers.partitions import partitions

# Shape, tile, group -> grid, blocks, size of a block, shape of accumulator.
PARTITIONS = {
    "columns": (((6, 4), (6, 1), None), ((1, 4), 4, 6, (1, 4))),
    "tiles": (((6, 4), (3, 2), None), ((2, 2), 4, 6, (2, 2))),
    "whole": (((6, 4), (6, 4), None), ((1, 1), 1, 24, (1, 1))),
    "member": (((6, 4), (6, 4), "g"), ((1, 1), 1, 24, ())),
    "no name": (((2,), (2,), ""), ((1,), 1, 2, ())),
    "one row": (((1, 4), (1, 1), None), ((1, 4), 4, 1, (1, 4))),
    "scalar": (((), (), None), ((), 1, 1, ())),
    "no blocks": (((6, 4), None, None), ((1, 1), 0, 24, (1, 1))),
    "empty": (((0, 4), (1, 2), None), ((0, 2), 0, 2, (0, 2))),
}


@pytest.mark.parametrize("kind", PARTITIONS)
def test_partition(kind):
    arguments, expected = PARTITIONS[kind]
    p = kb.Partition(*arguments)
    received = p.grid, p.num_blocks, p.block_size, p.accumulator_shape
    assert received == expected
    assert hash(p) == hash(kb.Partition(*arguments))
    assert p == kb.Partition(*arguments)
    with pytest.raises(AttributeError):
        p.shape = ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 6), (4,)), r"one entry per axis of the shape \(4, 6\).*\(4,\)"),
        (((4, 6), (4, 5)), "axis 1 has size 6, which 5 does not divide"),
        (((4, 6), (3, 6)), "axis 0 has size 4, which 3 does not divide"),
        (((4, 6), (0, 6)), "axis 0 has size 4, which 0 does not divide"),
        (((4, 6), (4, -6)), "axis 1 has size 6, which -6 does not divide"),
        (((4, 6), (4, 1), "g"), r"block_shape=\(4, 1\), group='g'"),
        (((4, 6), None, "g"), "block_shape=None, group='g'"),
        (((4, 6), (4, 1), ""), r"block_shape=\(4, 1\), group=''"),
    ],
)
def test_partition_that_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        kb.Partition(*arguments)


@examples
@given(partitions())
def test_tiles_cover_every_coordinate_once(partition):
    count = np.zeros(partition.shape)
    for _, block in corners(partition):
        count[block] += 1
        assert count[block].size == partition.block_size
    assert (count == 1).all()
    assert partition.num_blocks == math.prod(partition.accumulator_shape)


@examples
@given(partitions())
def test_view_is_the_smallest(partition):
    """Each axis is longer than 1 and, in turn, inside and across blocks."""
    rank = len(partition.view_shape)
    assert math.prod(partition.view_shape) == math.prod(partition.shape)
    assert 1 not in partition.view_shape
    inside = [axis in partition.view_axes for axis in range(rank)]
    assert all(a != b for a, b in zip(inside, inside[1:]))
    assert partition.view_grid == tuple(
        1 if here else n for here, n in zip(inside, partition.view_shape)
    )
