"""Newton-Schulz against NumPy, and variables as matrices."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

import keras_blockwise as kb
from helpers import oracle
from helpers.arrays import assert_near
from helpers.arrays import to_numpy
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.training import built
from keras_blockwise.algorithm.orthogonal import from_matrices
from keras_blockwise.algorithm.orthogonal import newton_schulz
from keras_blockwise.algorithm.orthogonal import to_matrices
from keras_blockwise.blocking.partition import Matrices


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 5)])
def test_newton_schulz(shape, exact):
    x = random(2, *shape)
    for steps in (1, 5):
        y = newton_schulz(steps)(ops.convert_to_tensor(x, "float64"), exact)
        expected = [oracle.newton_schulz(matrix, steps) for matrix in x]
        assert_near([y], [np.stack(expected)], 1e-12)
    assert np.all(np.abs(np.linalg.svd(to_numpy([y])[0])[1] - 0.95) < 0.3)


@pytest.mark.parametrize("exact", [False, True])
def test_small_singular_values_in_float32(exact):
    """Squares of theirs that float32 loses may not make the result blow up."""
    u, _, v = np.linalg.svd(random(8, 24), full_matrices=False)
    x = u * np.logspace(0, -7, 8) @ v
    y = newton_schulz(5)(ops.convert_to_tensor(x[None], "float32"), exact)
    assert_near([y[0]], [np.float32(oracle.newton_schulz(x))], 2e-3)


@pytest.mark.parametrize(
    "matrices, indices",
    [
        (Matrices((3, 4), (3, 4), (0,)), "ij->ij"),
        (Matrices((3, 4), (3, 4), (1,)), "ij->ji"),
        (Matrices((2, 3, 4), (2, 3, 4), (0, 2)), "ijk->ikj"),
        (Matrices((2, 3, 4), (2, 1, 4), (0,)), "ijk->jik"),
    ],
)
def test_axes(matrices, indices):
    x = random(*matrices.shape)
    expected = np.einsum(indices, x).reshape(matrices.matrix_shape)
    y = to_matrices(ops.convert_to_tensor(x), matrices)
    assert_near([y], [expected])
    assert_near([from_matrices(y, matrices)], [x])


def test_gates_are_matrices_of_their_own():
    matrices = Matrices((2, 12), (2, 3), (0,))
    x = random(2, 12)
    y = to_matrices(ops.convert_to_tensor(x), matrices)
    assert_near([y], [np.stack(np.split(x, 4, axis=1))])
    assert_near([from_matrices(y, matrices)], [x])


def directions(optimizer, gradients):
    """The change of a kernel in each step, of norm 1."""
    shapes = {"dense/kernel": (6, 4), "out/bias": (1,)}
    kernel, bias = make_variables(shapes)
    built(optimizer, [kernel, bias])
    changes = []
    for g in gradients:
        (before,) = to_numpy([kernel])
        optimizer.apply(tensors([g, np.ones(1)]))
        change = to_numpy([kernel])[0] - before
        changes.append(change / np.linalg.norm(change))
    return changes


# Before it had this argument, Keras's Muon failed on TensorFlow.
@pytest.mark.skipif(
    "rms_rate" not in inspect.signature(keras.optimizers.Muon).parameters,
    reason="this Keras has an older `Muon`",
)
@pytest.mark.parametrize("blocking", ["none", "variable"])
def test_without_smaller_blocks_it_is_muon(blocking):
    """Up to the length of a step, which Keras does not measure.

    In float32, since Keras's own cannot take a step in float64.
    """
    gradients = random(5, 6, 4)
    ours = kb.BlockMuon(blocking=blocking, output_layer="out")
    theirs = keras.optimizers.Muon(weight_decay=None)
    changes = [directions(optimizer, gradients) for optimizer in (ours, theirs)]
    assert_near(*changes, 1e-4)


def test_the_root_mean_square_of_a_step():
    (kernel,) = variables = make_variables({"dense/kernel": (6, 4)})
    kernels = [kernel, *make_variables({"dense_1/kernel": (4, 6)})]
    optimizer = built(kb.BlockMuon(0.5, output_layer="dense_1"), kernels)
    before = to_numpy(variables)[0]
    optimizer.apply(tensors([random(6, 4), random(4, 6)]))
    change = to_numpy(variables)[0] - before
    np.testing.assert_allclose(np.sqrt(np.mean(change**2)), 0.1, 1e-5)


@pytest.mark.parametrize("learning_rate", [0.0, 0.1])
def test_nothing_moves_without_a_gradient_or_a_rate(learning_rate):
    variables = make_variables({"dense/kernel": (6, 4), "dense/bias": (4,)})
    optimizer = kb.BlockMuon(learning_rate, output_layer=".*bias")
    built(optimizer, variables)
    before = to_numpy(variables)
    gradients = [random(6, 4), random(4)] if not learning_rate else [0.0, 0.0]
    shapes = [(6, 4), (4,)]
    gradients = [np.broadcast_to(g, s) for g, s in zip(gradients, shapes)]
    optimizer.apply(tensors(gradients))
    assert_near(to_numpy(variables), before)
