"""What is true of a step whatever the numbers are."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import keras_blockwise as kb
from helpers.cases import Case
from helpers.cases import make_variables
from helpers.cases import some_quick
from helpers.partitions import few_examples
from helpers.training import train

# Without epsilon, which would set a scale.
ROWS = [
    Case(kb.BlockAdam, {"epsilon": 0.0, "amsgrad": True}),
    Case(kb.AdamMini, {"epsilon": 0.0}),
    Case(kb.Adalayer, {"epsilon": 0.0}),
    Case(kb.BlockNadam, {"epsilon": 0.0}),
    Case(kb.BAGM, {"epsilon": 0.0, "accumulator": "polynomial"}),
    Case(kb.BAG, {"epsilon": 0.0, "initial_accumulator_value": 0.0}),
    Case(kb.BCOS, {"epsilon": 0.0}),
    Case(kb.SPAM, {"epsilon": 0.0, "reset_every": 2, "reset_warmup": 1}),
    Case(kb.BlockRMSprop, {"epsilon": 0.0, "momentum": 0.5}),
]
each_row = some_quick(
    ROWS, lambda case: case.cls in (kb.BlockAdam, kb.BAGM, kb.BlockRMSprop)
)
SHAPE = (4, 6)
TILES = [(4, 1), (1, 6), (2, 3), (4, 6), (1, 1)]
seeds = st.integers(0, 2**16)
STEPS = 3


def random_gradients(seed, shape=SHAPE):
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
    shapes = {f"dense_{k}/kernel": g.shape for k, g in enumerate(gradients[0])}
    variables = make_variables(shapes, "float64")
    for variable in variables:
        variable.assign(np.zeros(variable.shape))
    optimizer = case.make(blocking=blocking, jit_compile=False)
    return train(optimizer, variables, gradients)[: len(variables)]


def change(case, gradients, blocking):
    """The same of one variable."""
    return changes(case, [[g] for g in gradients], blocking)[0]


def assert_changed(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-14)


@each_row
@few_examples
@given(seeds, st.permutations(range(6)))
def test_permuting_output_units_permutes_the_change(case, seed, order):
    gradients = random_gradients(seed)
    expected = change(case, gradients, "output_unit")[:, order]
    permuted = [g[:, order] for g in gradients]
    assert_changed(change(case, permuted, "output_unit"), expected)


@each_row
@few_examples
@given(seeds, st.permutations(range(8)))
def test_permuting_a_block_permutes_its_change(case, seed, order):
    """The first two columns are one block."""

    def permute(x):
        block = x[:, :2].reshape(8)[order].reshape(4, 2)
        return np.concatenate([block, x[:, 2:]], axis=1)

    gradients = random_gradients(seed)
    expected = permute(change(case, gradients, (4, 2)))
    permuted = [permute(g) for g in gradients]
    assert_changed(change(case, permuted, (4, 2)), expected)


@each_row
@few_examples
@given(seeds, st.sampled_from(TILES), st.floats(1e-6, 1e6))
def test_scale_of_the_gradients_has_no_effect(case, seed, tile, scale):
    gradients = random_gradients(seed)
    scaled = [-scale * g for g in gradients]
    assert_changed(change(case, scaled, tile), -change(case, gradients, tile))


@each_row
@few_examples
@given(seeds, st.sampled_from(TILES[:3]), st.floats(1e-3, 1e3))
def test_blocks_do_not_see_each_other(case, seed, tile, scale):
    gradients = random_gradients(seed)
    others = [scale * g for g in gradients]
    for g, other in zip(gradients, others):
        other[: tile[0], : tile[1]] = g[: tile[0], : tile[1]]
    corner = (slice(tile[0]), slice(tile[1]))
    assert_changed(
        change(case, others, tile)[corner],
        change(case, gradients, tile)[corner],
    )


@each_row
@few_examples
@given(seeds, st.integers(1, 5))
def test_parts_of_a_group_are_as_the_whole(case, seed, cut):
    gradients = random_gradients(seed)
    whole = change(case, gradients, "variable")
    parts = [np.split(g, [cut], axis=1) for g in gradients]
    for scheme, equal in [("model", True), ("variable", False)]:
        joined = np.concatenate(changes(case, parts, scheme), axis=1)
        assert np.allclose(joined, whole, rtol=1e-10, atol=0) == equal


@each_row
@few_examples
@given(seeds)
def test_each_block_is_as_a_variable_of_its_own(case, seed):
    gradients = random_gradients(seed)
    together = change(case, gradients, "output_unit")
    columns = [np.split(g, SHAPE[1], axis=1) for g in gradients]
    alone = changes(case, columns, "variable")
    assert_changed(together, np.concatenate(alone, axis=1))


@each_row
@few_examples
@given(seeds)
def test_rank_does_not_matter(case, seed):
    """A tile of a tensor is as the same numbers in a vector."""
    gradients = random_gradients(seed)
    flat = [g.reshape(24) for g in gradients]
    cubes = [g.reshape(2, 3, 4) for g in gradients]
    expected = change(case, flat, (12,))
    assert_changed(change(case, cubes, (1, 3, 4)).reshape(24), expected)
    assert_changed(change(case, gradients, (2, 6)).reshape(24), expected)
