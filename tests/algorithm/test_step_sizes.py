"""The step sizes that are told of a step are those that it has taken."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_close
from helpers.cases import each_class
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors
from keras_blockwise.execution.plain import PlainKernels
from keras_blockwise.optimizer import last_step_sizes
from keras_blockwise.state.storage import values_by_weight

STEPS = 8
SINGLE = {"blocking": "coordinate", "jit_compile": False}
# Whose axes the names leave no choice of.
TWO_LAYERS = {
    "dense/kernel": (4, 3),
    "dense/bias": (3,),
    "out/kernel": (3, 2),
    "out/bias": (2,),
}
# Which of these take a step by matrices, with the rules below.
MATRICES = {kb.BlockMuon: {0}, kb.AdaBlock: {0, 1, 2}}


def trained(optimizer, shapes, steps=STEPS, dtype="float32"):
    """After some steps on variables of these shapes."""
    optimizer.build(make_variables(shapes, dtype))
    for gradients in make_gradients(steps, shapes):
        optimizer.apply(tensors(gradients, dtype))
    return optimizer


def found_in(optimizer):
    """Step sizes, and what is at the floor, by the position of the variable."""
    found = last_step_sizes(optimizer)
    convert = keras.ops.convert_to_numpy
    return (
        {i: convert(own.values) for i, own in found.items()},
        {i: convert(own.at_floor) for i, own in found.items()},
    )


def schedule():
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [3, STEPS - 1], [0.5, 0.25, 0.125]
    )


@each_class
def test_those_of_the_step_itself(case, monkeypatch):
    """Of the last step, whose rate is not that of the next."""
    taken = {}
    run = PlainKernels.run

    def recorded(self, blocks, entries):
        for block in blocks:
            step_size, *_ = block.function(block.means, *block.statistics)
            taken.update(block.by_position(step_size))
        return run(self, blocks, entries)

    monkeypatch.setattr(PlainKernels, "run", recorded)
    rules = {"dense/.*": "layer", "out/bias": "none"}
    optimizer = case.make(
        schedule(),
        blocking=kb.Blocking("output_unit", rules=rules),
        jit_compile=False,
    )
    sizes, at_floor = found_in(trained(optimizer, TWO_LAYERS))
    assert sizes.keys() == at_floor.keys() == {0, 1, 2, 3}
    assert sizes[3] == 0.25 and np.isnan(at_floor[3])
    rate = 0.25 if case.cls in MATRICES else 1.0
    assert taken.keys() == sizes.keys() - MATRICES.get(case.cls, set())
    for i in taken.keys() - {3}:
        if case.cls is kb.BCOS:
            assert np.isnan(sizes[i]) and np.isnan(at_floor[i])
        else:
            expected = rate * keras.ops.convert_to_numpy(taken[i])
            assert_close([sizes[i]], [expected], 1e-6)
            assert not at_floor[i].any()


def test_adablock_written_out():
    """Those of the diagonals, between the bounds."""
    optimizer = kb.AdaBlock(
        0.5,
        beta_1=0.5,
        beta_2=0.75,
        epsilon=1e-2,
        bounds=(1.0, 0.5),
        blocking=(None, 1),
        jit_compile=False,
    )
    trained(optimizer, {"dense/kernel": (4, 3)}, 3)
    (sizes,), (at_floor,) = (found.values() for found in found_in(optimizer))
    (velocity,) = values_by_weight(optimizer.block_state)["velocity"].values()
    v = np.diagonal(velocity.reshape(3, 4, 4), axis1=1, axis2=2)
    expected = np.sqrt(1 - 0.75**3) / (np.sqrt(v) + 1e-2)
    end = 1 - 0.5**3
    expected = 0.5 * np.clip(expected, end * 1.5 / 2.5, end * 2.5 / 1.5)
    np.testing.assert_allclose(sizes.reshape(3, 4), expected, 1e-5)
    assert at_floor.size == 12 and not at_floor.any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_adam_written_out(dtype):
    """With a multiplier, small slots in one vector, and a variable left out."""
    shapes = {f"dense_{i}/kernel": (4, 3) for i in range(20)}
    optimizer = kb.BlockAdam(
        0.5,
        beta_2=0.75,
        epsilon=1e-2,
        jit_compile=False,
        learning_rate_multipliers={"dense_1/kernel": 0.25},
        blocking=(None, 1),
    )
    trained(optimizer, {**shapes, "empty": (0, 3)}, 3, dtype)
    sizes, at_floor = found_in(optimizer)
    assert sizes.keys() == at_floor.keys() == set(range(20))
    velocity = values_by_weight(optimizer.block_state)["velocity"]
    for i, value in sizes.items():
        root = np.sqrt(velocity[i]) + 1e-2
        rate = 0.125 if i == 1 else 0.5
        expected = rate * np.sqrt(1 - 0.75**3) / root
        assert value.dtype == max(dtype, "float32", key=lambda d: d[-2:])
        np.testing.assert_allclose(value, expected, 1e-5)
        assert (at_floor[i] == (np.sqrt(velocity[i]) <= 1e-2)).all()


@pytest.mark.parametrize(
    ("optimizer", "edge"),
    [
        # sqrt(v) <= epsilon.
        (kb.BlockAdam(1.0, beta_2=0.0, epsilon=0.5, **SINGLE), 0.5),
        # sqrt(v + epsilon) <= 2 * sqrt(epsilon).
        (kb.BlockRMSprop(1.0, rho=0.0, epsilon=0.25, **SINGLE), 0.75**0.5),
        # After the bias correction.
        (kb.AdamMini(1.0, beta_2=0.75, epsilon=0.5, **SINGLE), 0.5),
    ],
    ids=["outside", "inside", "corrected"],
)
def test_the_floor(optimizer, edge):
    """The root is at most twice what it is without gradients."""
    optimizer.build([keras.Variable(np.ones((1, 3)), name="kernel")])
    gradient = np.array([[0.0, 0.999, 1.001]]) * edge
    optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")])
    _, at_floor = found_in(optimizer)
    assert at_floor[0].ravel().tolist() == [1.0, 1.0, 0.0]


def test_no_epsilon():
    """All step sizes are numbers but where no gradient has ever been."""
    optimizer = kb.BlockAdam(1.0, epsilon=0.0, **SINGLE)
    optimizer.build([keras.Variable(np.ones((1, 3)), name="kernel")])
    optimizer.apply([keras.ops.convert_to_tensor([[0.0, 1.0, 2.0]])])
    sizes, at_floor = found_in(optimizer)
    assert at_floor[0].tolist() == [[1.0, 0.0, 0.0]]
    assert np.isfinite(sizes[0]).tolist() == [[False, True, True]]


@pytest.mark.parametrize("blocking", ["output_unit", "none"])
def test_a_hidden_matrix_has_the_mean_of_the_rate(blocking):
    optimizer = kb.BlockMuon(
        0.5, output_layer="out/.*", blocking=blocking, jit_compile=False
    )
    sizes, _ = found_in(trained(optimizer, TWO_LAYERS))
    assert sizes[0].mean() == pytest.approx(0.5)
    if blocking == "none":
        assert sizes[0].shape == ()
        return
    v = values_by_weight(optimizer.block_state)["velocity"][0]
    inverse = 1 / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(sizes[0], 0.5 * inverse / inverse.mean(), 1e-5)


def test_without_blocks_a_rate_of_its_own():
    optimizer = kb.Adalayer(
        0.5,
        sgd_learning_rate=0.125,
        output_layer="out",
        jit_compile=False,
        learning_rate_multipliers={"dense/kernel": 0.5},
    )
    sizes, at_floor = found_in(trained(optimizer, TWO_LAYERS))
    assert sizes[0] == np.float32(0.0625) and np.isnan(at_floor[0])
    assert sizes[2].shape == (1, 2) and not at_floor[2].any()
