"""Groups, codes and scales."""

import numpy as np
import pytest
from keras import ops
from keras.ops import convert_to_numpy as to_numpy

from keras_blockwise.algorithm.eight_bits import MOST
from keras_blockwise.algorithm.eight_bits import Encoding
from keras_blockwise.algorithm.eight_bits import Groups
from keras_blockwise.algorithm.eight_bits import decode
from keras_blockwise.algorithm.eight_bits import factors
from keras_blockwise.algorithm.eight_bits import largest_of
from keras_blockwise.algorithm.eight_bits import saves_memory
from keras_blockwise.algorithm.rounding import seeds
from keras_blockwise.blocking.partition import Partition

# Shape and block, and the size of a group and the shape of the scales.
GROUPS = {
    "output units": ((768, 10), (768, 1), 256, (3, 10)),
    "square": ((4, 4), (4, 1), 4, (1, 4)),
    "rows": ((10, 768), (1, 768), 256, (10, 3)),
    "filters": ((3, 3, 64, 5), (3, 3, 64, 1), 192, (3, 5)),
    "heads": ((512, 4, 64), (512, 1, 64), 256, (2, 4, 64)),
    "tiles": ((8, 6), (4, 3), 4, (2, 1, 2, 3)),
    "one block": ((30, 20), (30, 20), 200, (3,)),
    "no blocks": ((30, 20), None, 200, (3,)),
    "a vector of one block": ((300,), (300,), 150, (2,)),
    "a prime": ((257, 3), (257, 1), 256, (2, 3)),
    "twice a prime": ((3, 1018), (1, 1018), 256, (3, 4)),
}
every_grouping = pytest.mark.parametrize("name", GROUPS)


def groups_of(name):
    shape, block, *_ = GROUPS[name]
    return Groups.of(Partition(shape, block))


def numbers(groups, seed=0):
    """Of another scale in each entry of the view's first axis."""
    rng = np.random.default_rng(seed)
    x = np.float32(rng.normal(size=groups.view))
    scales = np.exp(rng.normal(0.0, 3.0, groups.view[0]))
    x = x * scales.reshape(-1, *(1 for _ in groups.view[1:]))
    return np.float32(x).reshape(groups.shape)


def encode(x, groups, *encoding):
    return Encoding(groups, *encoding).encode(ops.convert_to_tensor(x))


def of_entries(values, groups):
    """Values of groups for each entry, one by one."""
    values = np.moveaxis(to_numpy(values), groups.axis, 0)
    n = groups.view[groups.axis]
    spread = np.stack([values[i // groups.size] for i in range(n)])
    return np.moveaxis(spread, 0, groups.axis).reshape(groups.shape)


@every_grouping
def test_groups(name):
    *_, size, scale_shape = GROUPS[name]
    groups = groups_of(name)
    assert (groups.size, groups.scale_shape) == (size, scale_shape)


@every_grouping
def test_codes_and_scales(name):
    groups = groups_of(name)
    x = numbers(groups)
    codes, scales = encode(x, groups)
    assert to_numpy(codes).dtype == "int8" and codes.shape == groups.shape
    assert to_numpy(scales).dtype == "float32"
    assert scales.shape == groups.scale_shape
    codes, units = np.float64(to_numpy(codes)), of_entries(scales, groups)
    assert np.abs(codes).max() == MOST
    assert (np.abs(x) <= 127.001 * units).all()
    assert (np.abs(codes * units - x) <= 0.501 * units).all()
    np.testing.assert_array_equal(
        to_numpy(decode(*encode(x, groups), groups)), np.float32(codes * units)
    )


@every_grouping
def test_what_was_decoded_is_encoded_as_it_was(name):
    groups = groups_of(name)
    codes, scales = encode(numbers(groups), groups)
    again, new = encode(to_numpy(decode(codes, scales, groups)), groups)
    np.testing.assert_array_equal(to_numpy(again), to_numpy(codes))
    np.testing.assert_allclose(to_numpy(new), to_numpy(scales), 1e-6)


@every_grouping
def test_a_scale_is_that_of_neighbours_in_a_block(name):
    """One large entry changes the scale of its group, of one block, alone."""
    shape, block, size, _ = GROUPS[name]
    groups, partition = groups_of(name), Partition(shape, block)
    x = np.ones(shape, np.float32)
    x.flat[x.size // 2] = 1000.0
    _, scales = encode(x, groups)
    changed = of_entries(scales, groups) > 1.0
    assert 0 < changed.sum() <= size
    assert len(np.unique(partition.blocks[changed])) == 1


@pytest.mark.parametrize(
    "name, rows, shape",
    [
        ("output units", 3, (1, 256, 10)),
        ("rows", 5, (1, 2, 768)),
        ("filters", 3, (192, 5)),
        ("heads", 2, (1, 256, 4, 64)),
        ("one block", 1, (1, 30, 20)),
    ],
)
def test_rows_are_encoded_as_the_whole(name, rows, shape):
    groups = groups_of(name)
    x = numbers(groups)
    of_row = groups.of_row(shape)
    encoded = [encode(row, of_row) for row in x.reshape(rows, *shape)]
    for received, expected in zip(zip(*encoded), encode(x, groups)):
        received = np.concatenate([to_numpy(row).ravel() for row in received])
        np.testing.assert_array_equal(received, to_numpy(expected).ravel())


def test_rounding_is_right_on_average():
    groups = Groups.of(Partition((64, 3), (64, 1)))
    x = numbers(groups)
    total = np.zeros(x.shape)
    steps = 100
    for step in range(steps):
        step = ops.convert_to_tensor(step, "int32")
        encoded = encode(x, groups, seeds(step, 0, groups.shape))
        total += to_numpy(decode(*encoded, groups))
    units = of_entries(encode(x, groups)[1], groups)
    assert (np.abs(total / steps - x) < 0.2 * units).all()


@pytest.mark.parametrize("x", [0.0, 1e-35, 2.0**-90, 1e30])
def test_of_any_size(x):
    groups = Groups.of(Partition((4, 3), (4, 1)))
    x = np.full(groups.shape, x, np.float32)
    largest = largest_of(ops.convert_to_tensor(x), groups)
    assert np.isfinite(to_numpy(factors(largest))).all()
    decoded = to_numpy(decode(*encode(x, groups), groups))
    np.testing.assert_allclose(decoded, np.where(x < 1e-32, 0.0, x), 1e-5)


def test_what_is_not_finite_is_so_afterwards():
    groups = Groups.of(Partition((4, 3), (4, 1)))
    x = np.ones(groups.shape, np.float32)
    x[1, 0], x[2, 2] = np.nan, np.inf
    decoded = to_numpy(decode(*encode(x, groups), groups))
    assert not np.isfinite(decoded[:, [0, 2]]).all()
    assert (decoded[:, 1] == 1.0).all()


SAVING = {
    "blocks of one entry": (((30, 20), (1, 1)), False),
    "a bias": (((300,), (1,)), False),
    "blocks of two, of 16 bits": (((2, 300), (2, 1)), False),
    "empty": (((0, 3), (1, 1)), False),
    "a scalar": (((), ()), False),
    "rows shorter than a group": (((300, 16), (1, 16)), True),
}


@pytest.mark.parametrize("name", SAVING)
def test_where_8_bits_save_memory(name):
    arguments, saves = SAVING[name]
    assert saves_memory(Partition(*arguments), 2) == saves
