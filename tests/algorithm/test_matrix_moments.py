"""AdaBlock: second moments that are matrices, and what they promise."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers import oracle
from helpers.arrays import assert_close
from helpers.arrays import assert_differ
from helpers.arrays import refused
from helpers.arrays import to_numpy
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import slots_of
from helpers.training import built
from helpers.training import eager
from helpers.training import graph
from helpers.training import train
from keras_blockwise.algorithm import matrix_moments
from keras_blockwise.algorithm.matrix_moments import MatrixMoments

SHAPES = {"dense/kernel": (3, 4), "dense/bias": (4,), "dense_1/kernel": (2, 6)}
each_wrap = pytest.mark.parametrize("wrap", [eager, graph], ids=["", "graph"])


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def changes(gradients, shapes=SHAPES, dtype="float64", wrap=eager, **kwargs):
    """What training changes in each variable, and the optimizer."""
    variables = make_variables(shapes, dtype)
    before = to_numpy(variables)
    optimizer = kb.AdaBlock(0.125, **{"jit_compile": False, **kwargs})
    after = train(optimizer, variables, gradients, wrap)[: len(before)]
    return [x - y for x, y in zip(after, before)], optimizer


def test_a_step_turns_with_the_coordinates_of_a_block():
    kernel = {"dense/kernel": (3, 4)}
    turn, _ = np.linalg.qr(random(4, 4))
    gradients = [[g * np.arange(1, 5)] for g in random(8, 3, 4)]
    (straight,), _ = changes(gradients, kernel)
    (turned,), _ = changes([[g @ turn] for (g,) in gradients], kernel)
    assert_close([turned], [straight @ turn], 1e-8)
    (by_entry,), _ = changes(
        [[g @ turn] for (g,) in gradients], kernel, blocking="coordinate"
    )
    assert_differ([by_entry], [turned], 0.01)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_least_eigenvalue(dtype):
    """Entries far below the others of their block have shorter steps."""
    kernel = {"dense/kernel": (1, 2)}
    gradients = [[np.array([[1.0, 0.0]])], [np.array([[0.0, 2.0**-20]])]]
    arguments = {"dtype": dtype, "beta_1": 0.0, "beta_2": 0.5, "epsilon": 0.0}
    (first,), _ = changes(gradients[:1], kernel, **arguments)
    (both,), _ = changes(gradients, kernel, **arguments)
    # v = (0.25, 2^-41), of which 2^-23 is 2^-25; the correction is 0.75.
    assert_close(
        [both - first], [[[0.0, -0.125 * 0.75**0.5 * 2.0**-7.5]]], 1e-5, 1e-7
    )


def test_the_first_step_of_a_block_has_the_learning_rate_for_a_norm():
    (kernel, bias, _), _ = changes(make_gradients(1, SHAPES), epsilon=0.0)
    assert_close([np.linalg.norm(kernel, axis=1)], [[0.125] * 3], 1e-6)
    assert_close([np.abs(bias)], [[0.125] * 4], 1e-12)


def test_bounds_hold_the_step_between_them():
    """Along the momentum, all of a step is between two multiples of it."""
    bounds = 2.0, 0.25
    gradients = make_gradients(1, SHAPES) * 3
    before, _ = changes(gradients[:2], bounds=bounds)
    after, optimizer = changes(gradients, bounds=bounds)
    momentum = [v for k, v in slots_of(optimizer).items() if "momentum" in k]
    lowest, highest = (
        0.125 * 2.0 * factor for factor in (1 - 1 / 1.75, 1 + 1 / 0.75)
    )
    ratios = [
        -np.sum((x - y) * m, -1) / np.sum(m * m, -1)
        for x, y, m in zip(after, before, momentum)
    ]
    for ratio in ratios:
        assert (ratio > lowest * 0.999).all()
        assert (ratio < highest * 1.001).all()
    free, _ = changes(gradients)
    assert_differ(free, after)


def test_bounds_close_in_on_sgd_with_momentum():
    gradients = make_gradients(9, SHAPES)
    (kernel, bias, _), _ = changes(gradients, bounds=(2.0, 1e9))
    for change, k in ((kernel, 0), (bias, 1)):
        m, expected = 0.0, 0.0
        for given in gradients:
            m = 0.9 * m + 0.1 * given[k]
            expected = expected - 0.25 * m
        assert_close([change], [expected], 1e-6)


def test_draws():
    """As many in each step, and all as often as one another."""

    def turns_of(layers_per_step, seed):
        turns = MatrixMoments(layers_per_step, seed).turns(range(5))
        return np.array(list(turns.values()))

    turns = turns_of(2, 7)
    assert turns.shape == (5, matrix_moments.ROUND)
    assert (turns.sum(axis=0) == 2).all()
    assert (np.abs(turns.mean(axis=1) - 0.4) < 0.05).all()
    assert (turns == turns_of(2, 7)).all()
    assert (turns != turns_of(2, 8)).any()
    assert turns_of(9, 0).all()
    assert MatrixMoments(None, 0).turns(range(5)) == {}


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@each_wrap
def test_layers_that_are_drawn(wrap, jit_compile):
    """Of three with matrices, two in each step; a vector is none of them."""
    shapes = {**SHAPES, "dense_2/kernel": (2, 2)}
    turns = MatrixMoments(2, 3).turns(range(3))
    numbers = {0: 0, 2: 1, 3: 2}
    weights = [v.numpy() for v in make_variables(shapes, "float64")]
    labels, start = [], 0
    for shape in shapes.values():
        tile = (1, shape[1]) if len(shape) > 1 else (1,)
        labels.append(oracle.tile_labels(shape, tile, start))
        start = labels[-1].max() + 1
    truth = oracle.AdaBlock(
        weights,
        labels,
        drawn=lambda t, k: k not in numbers or turns[numbers[k]][t - 1],
    )
    gradients = make_gradients(6, shapes)
    for given in gradients:
        truth.step(given, 0.125)
    actual, _ = changes(
        gradients,
        shapes,
        wrap=wrap,
        jit_compile=jit_compile,
        layers_per_step=2,
        seed=3,
    )
    expected = [x - y for x, y in zip(truth.weights, weights)]
    # XLA decomposes float64 as it does float32. Measured: 8e-5.
    assert_close(actual, expected, 1e-4 if jit_compile else 1e-9)


@pytest.mark.tensorflow
def test_what_is_not_drawn_is_not_decomposed(monkeypatch):
    calls = []
    eigh = keras.ops.linalg.eigh

    def counted(v):
        calls.append(v.shape)
        return eigh(v)

    monkeypatch.setattr(keras.ops.linalg, "eigh", counted)
    gradients = make_gradients(5, SHAPES)
    changes(gradients, wrap=eager, layers_per_step=1)
    assert len(calls) == 5
    changes(gradients, wrap=eager)
    assert len(calls) == 15


def test_the_largest_block():
    shapes = {"dense/kernel": (32, 2)}
    (change,), _ = changes(
        make_gradients(1, shapes), shapes, blocking="output_unit"
    )
    assert_close([np.linalg.norm(change, axis=0)], [[0.125] * 2], 1e-2)


@pytest.mark.parametrize(
    ("value", "wrap"),
    [(np.nan, eager), (np.inf, eager), (1e30, eager), (np.nan, graph)],
)
def test_what_is_not_finite_stays_in_its_block(value, wrap):
    """And raises no error, as some libraries do; `1e30` has no square."""
    gradients = make_gradients(2, SHAPES)
    gradients[1][0][0, 0] = value
    (kernel, bias, other), _ = changes(gradients, dtype="float32", wrap=wrap)
    if value == 1e30:  # Infinite moments allow no step.
        (before, *_), _ = changes(gradients[:1], dtype="float32", wrap=wrap)
        np.testing.assert_array_equal(kernel[0], before[0])
    else:
        assert not np.isfinite(kernel[0]).all()
    for change in (kernel[1:], bias, other):
        assert np.isfinite(change).all()


def test_the_state_is_one_number_per_weight_and_a_matrix_per_block():
    optimizer = built(kb.AdaBlock(), make_variables(SHAPES))
    shapes = {name: value.shape for name, value in slots_of(optimizer).items()}
    assert shapes == {
        "dense_kernel_momentum": (3, 4),
        "dense_kernel_velocity": (3, 1, 4, 4),
        "dense_bias_momentum": (4,),
        "dense_bias_velocity": (4,),
        "dense_1_kernel_momentum": (2, 6),
        "dense_1_kernel_velocity": (2, 1, 6, 6),
    }
    rows = kb.summary(optimizer).rows
    expected = [4 * 12 * (1 + 4), 4 * 4 * 2, 4 * 12 * (1 + 6)]
    assert [row.state_bytes for row in rows] == expected


def test_blocks_that_others_share_are_their_own():
    optimizer = built(kb.AdaBlock(blocking="layer"), make_variables(SHAPES))
    tiles = [(p.block_shape, p.group) for p in optimizer.partitions]
    assert tiles == [((3, 4), None), ((4,), None), ((2, 6), None)]


def test_the_state_of_the_same_blocks_is_converted():
    source = kb.AdaBlock(blocking="adablock")
    variables = make_variables(SHAPES)
    train(source, variables, make_gradients(3, SHAPES))
    target = built(kb.AdaBlock(layers_per_step=1), variables)
    kb.convert_state(source, target)
    for name, value in slots_of(source).items():
        np.testing.assert_array_equal(slots_of(target)[name], value)


@pytest.mark.parametrize("blocking", ["coordinate", "variable"])
def test_matrices_of_other_blocks_are_not_converted(blocking):
    variables = make_variables(SHAPES)
    source = built(kb.AdaBlock(), variables)
    target = built(kb.AdaBlock(blocking=blocking), variables)
    message = r"The blocks of variable 'dense/kernel' must be the same in "
    with refused(target.variables, message):
        kb.convert_state(source, target)


def test_other_blocks_of_a_saved_state_are_refused():
    source = built(kb.AdaBlock(), make_variables(SHAPES))
    target = built(kb.AdaBlock(blocking="coordinate"), make_variables(SHAPES))
    saved = dict(enumerate_state(source))
    with refused(target.variables, r"'dense_kernel_velocity' is .*\(3, 1, 4"):
        target.load_own_variables(saved)


def enumerate_state(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store.items()
