"""What must hold for every shape, tile and gradient."""

import math

import keras
import numpy as np
import pytest
from cases import Case
from hypothesis import Phase
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

import keras_blockwise as kb
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.reduction import block_mean
from keras_blockwise.reduction import block_sum
from keras_blockwise.step import broadcastable

examples = settings(
    deadline=None,
    derandomize=True,
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
)
few_examples = settings(examples, max_examples=5)


@st.composite
def partitions(draw, max_rank=4):
    """A grid of tiles; many extents are 1."""
    rank = draw(st.integers(0, max_rank))
    extents = st.lists(
        st.sampled_from([1, 1, 2, 3]), min_size=rank, max_size=rank
    )
    grid, tile = draw(extents), draw(extents)
    shape = tuple(n * size for n, size in zip(grid, tile))
    return Partition(shape, tuple(tile))


def corners(partition):
    """The slices of each block, in the order of the grid."""
    for index in np.ndindex(*partition.grid):
        yield (
            index,
            tuple(
                slice(i * size, (i + 1) * size)
                for i, size in zip(index, partition.block_shape)
            ),
        )


def integers(shape):
    """Numbers whose sums are exact, no two alike."""
    return np.arange(1.0, 1 + math.prod(shape)).reshape(shape)


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
def test_broadcastable_scale_is_that_of_brute_force(partition):
    check_broadcastable(partition)


def test_broadcastable_scale_of_a_tile_that_splits_three_axes():
    check_broadcastable(Partition((4, 4, 4), (2, 2, 2)))


def test_broadcastable_scale_of_blocks_on_every_other_axis():
    """Six factors, which TensorFlow multiplies only where it compiles."""
    check_broadcastable(Partition((2, 3, 2, 3, 2, 3), (2, 1, 2, 1, 2, 1)))


def check_broadcastable(partition):
    x, scale = integers(partition.shape), integers(partition.grid)
    expected = x.copy()
    for index, block in corners(partition):
        expected[block] *= scale[index]
    scale = keras.ops.convert_to_tensor(scale)
    shape, scale = broadcastable([scale], [partition])
    assert len(scale.shape) == len(shape)
    actual = keras.ops.reshape(x, shape) * scale
    actual = keras.ops.reshape(actual, partition.shape)
    np.testing.assert_array_equal(actual, expected)


@examples
@given(st.lists(partitions(max_rank=3), min_size=2, max_size=4))
def test_broadcastable_scale_of_joined_variables_is_that_of_each(members):
    scales = [1000.0 * i + integers(p.grid) for i, p in enumerate(members)]
    expected = []
    for partition, scale in zip(members, scales):
        of_entries = np.zeros(partition.shape)
        for index, block in corners(partition):
            of_entries[block] = scale[index]
        expected.append(of_entries.ravel())
    shape, actual = broadcastable(
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
    mean = block_mean([keras.ops.convert_to_tensor(x) for x in xs], members)
    np.testing.assert_allclose(mean, flat.mean(), rtol=1e-14)


# Without epsilon, which would set a scale.
CASES = [
    Case(kb.BlockAdam, {"epsilon": 0.0, "amsgrad": True}),
    Case(kb.AdamMini, {"epsilon": 0.0}),
    Case(kb.BAGM, {"epsilon": 0.0, "accumulator": "polynomial"}),
    Case(kb.BAG, {"epsilon": 0.0, "initial_accumulator_value": 0.0}),
    Case(kb.BlockRMSprop, {"epsilon": 0.0, "momentum": 0.5}),
]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
SHAPE = (4, 6)
TILES = [(4, 1), (1, 6), (2, 3), (4, 6), (1, 1)]
seeds = st.integers(0, 2**16)
STEPS = 3


def gradients_of(seed, shape=SHAPE):
    """Gradients of some steps, no two coordinates on one scale."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=shape))
    return [scale * rng.normal(size=shape) for _ in range(STEPS)]


def changes(case, gradients, blocking):
    """What training changes in each variable.

    Args:
        case: The optimizer.
        gradients: Those of each step, a list of arrays.
        blocking: The blocks.
    """
    variables = []
    for k, g in enumerate(gradients[0]):
        with keras.name_scope(f"dense_{k}"):
            variables.append(
                keras.Variable(
                    np.zeros(g.shape), dtype="float64", name="kernel"
                )
            )
    optimizer = case.make(blocking=blocking, jit_compile=False)
    optimizer.build(variables)
    for given_gradients in gradients:
        optimizer.apply(
            [keras.ops.convert_to_tensor(g) for g in given_gradients]
        )
    return [keras.ops.convert_to_numpy(v) for v in variables]


def change(case, gradients, blocking):
    """The same of one variable."""
    return changes(case, [[g] for g in gradients], blocking)[0]


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-14)


@by_case
@few_examples
@given(seeds, st.permutations(range(6)))
def test_permuting_output_units_permutes_the_change(case, seed, order):
    gradients = gradients_of(seed)
    expected = change(case, gradients, "output_unit")[:, order]
    permuted = [g[:, order] for g in gradients]
    assert_close(change(case, permuted, "output_unit"), expected)


@by_case
@few_examples
@given(seeds, st.permutations(range(8)))
def test_permuting_a_block_permutes_its_change(case, seed, order):
    """The first two columns are one block."""

    def permute(x):
        block = x[:, :2].reshape(8)[order].reshape(4, 2)
        return np.concatenate([block, x[:, 2:]], axis=1)

    gradients = gradients_of(seed)
    expected = permute(change(case, gradients, (4, 2)))
    permuted = [permute(g) for g in gradients]
    assert_close(change(case, permuted, (4, 2)), expected)


@by_case
@few_examples
@given(seeds, st.sampled_from(TILES), st.floats(1e-6, 1e6))
def test_scale_of_the_gradients_has_no_effect(case, seed, tile, scale):
    gradients = gradients_of(seed)
    scaled = [-scale * g for g in gradients]
    assert_close(change(case, scaled, tile), -change(case, gradients, tile))


@by_case
@few_examples
@given(seeds, st.sampled_from(TILES[:3]), st.floats(1e-3, 1e3))
def test_blocks_do_not_see_each_other(case, seed, tile, scale):
    gradients = gradients_of(seed)
    others = [scale * g for g in gradients]
    for g, other in zip(gradients, others):
        other[: tile[0], : tile[1]] = g[: tile[0], : tile[1]]
    corner = (slice(tile[0]), slice(tile[1]))
    assert_close(
        change(case, others, tile)[corner],
        change(case, gradients, tile)[corner],
    )


@by_case
@few_examples
@given(seeds, st.integers(1, 5))
def test_parts_of_a_group_are_as_the_whole(case, seed, cut):
    gradients = gradients_of(seed)
    whole = change(case, gradients, "variable")
    parts = [np.split(g, [cut], axis=1) for g in gradients]
    for scheme, equal in [("model", True), ("variable", False)]:
        joined = np.concatenate(changes(case, parts, scheme), axis=1)
        assert np.allclose(joined, whole, rtol=1e-10, atol=0) == equal


@by_case
@few_examples
@given(seeds)
def test_each_block_is_as_a_variable_of_its_own(case, seed):
    gradients = gradients_of(seed)
    together = change(case, gradients, "output_unit")
    columns = [np.split(g, SHAPE[1], axis=1) for g in gradients]
    alone = changes(case, columns, "variable")
    assert_close(together, np.concatenate(alone, axis=1))


@by_case
@few_examples
@given(seeds)
def test_rank_does_not_matter(case, seed):
    """A tile of a tensor is as the same numbers in a vector."""
    gradients = gradients_of(seed)
    flat = [g.reshape(24) for g in gradients]
    cubes = [g.reshape(2, 3, 4) for g in gradients]
    expected = change(case, flat, (12,))
    assert_close(change(case, cubes, (1, 3, 4)).reshape(24), expected)
    assert_close(change(case, gradients, (2, 6)).reshape(24), expected)
