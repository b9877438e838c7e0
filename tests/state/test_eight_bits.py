"""A momentum in 8 bits, from the plan to the file; and weights of 16 bits."""

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy as to_numpy

import keras_blockwise as kb
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import slots_of
from helpers.cases import tensors
from keras_blockwise.state.storage import values_by_weight

SHAPES = {
    "dense/kernel": (300, 4),
    "dense/bias": (4,),
    "dense_1/kernel": (8, 8),
    "embedding/embeddings": (20, 16),
}


def trained(steps=3, cls=kb.BlockAdam, seed=1, variables=None, **kwargs):
    """Variables and the optimizer that has taken some steps."""
    variables = variables or make_variables(SHAPES)
    optimizer = cls(0.01, **kwargs)
    optimizer.build(variables)
    for gradients in make_gradients(steps, SHAPES, seed):
        optimizer.apply(tensors(gradients), variables)
    return variables, optimizer


def momentum(optimizer):
    return values_by_weight(optimizer.block_state)["momentum"]


def saved(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


def assert_equal(states):
    first, second = states
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], name)


def test_what_each_variable_gets():
    _, optimizer = trained(momentum_dtype="int8")
    rows = {row.path: row for row in kb.summary(optimizer).rows}
    dtypes = {path: row.momentum_dtype for path, row in rows.items()}
    assert dtypes == {
        "dense/kernel": "int8",
        "dense/bias": "float32",  # Each entry is a block.
        "dense_1/kernel": "int8",
        "embedding/embeddings": "int8",
    }
    # Codes, two scales per column, and the second moments.
    assert rows["dense/kernel"].state_bytes == 1200 + 4 * 8 + 4 * 4
    assert "momentum" in str(kb.summary(optimizer)).splitlines()[1]
    assert "int8" in str(kb.summary(optimizer))


def test_summary_of_float32_has_no_such_column():
    _, optimizer = trained()
    assert "momentum" not in str(kb.summary(optimizer))


def test_repeatable_and_of_each_step():
    _, first = trained(momentum_dtype="int8")
    _, second = trained(momentum_dtype="int8")
    assert_equal([slots_of(first), slots_of(second)])
    # The same numbers are rounded in other ways in another step.
    second.iterations.assign(100)
    gradients = tensors(make_gradients(1, SHAPES, 5)[0])
    first.apply(gradients)
    second.apply(gradients)
    codes = [slots_of(o)["dense_kernel_momentum"] for o in (first, second)]
    assert (codes[0] != codes[1]).any()


def test_a_step_left_out_leaves_every_code():
    variables, optimizer = trained(momentum_dtype="int8", skip_nonfinite=True)
    before = slots_of(optimizer)
    gradients = tensors(make_gradients(1, SHAPES)[0])
    gradients[1] = gradients[1] * np.inf
    optimizer.apply(gradients, variables)
    assert int(optimizer.skipped_steps) == 1
    assert_equal([slots_of(optimizer), before])


def test_goes_on_from_a_saved_state():
    variables, optimizer = trained(momentum_dtype="int8")
    others, other = trained(1, seed=9, momentum_dtype="int8")
    other.load_own_variables(saved(optimizer))
    for own, value in zip(others, variables):
        own.assign(value)
    for gradients in make_gradients(2, SHAPES, 4):
        optimizer.apply(tensors(gradients), variables)
        other.apply(tensors(gradients), others)
    assert_equal([slots_of(optimizer), slots_of(other)])


DTYPES = [None, "bfloat16", "int8"]


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_a_state_of_another_dtype_is_refused(source, target):
    _, own = trained(momentum_dtype=source)
    _, optimizer = trained(1, momentum_dtype=target)
    before = slots_of(optimizer)
    if source == target:
        optimizer.load_own_variables(saved(own))
        assert_equal([slots_of(optimizer), slots_of(own)])
        return
    with pytest.raises(
        ValueError, match="(?s)`momentum_dtype`.*Received.*`convert_state`"
    ):
        optimizer.load_own_variables(saved(own))
    assert_equal([slots_of(optimizer), before])


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_a_state_of_another_dtype_is_converted(source, target):
    _, own = trained(momentum_dtype=source)
    _, optimizer = trained(1, momentum_dtype=target)
    kb.convert_state(own, optimizer)
    error = {None: 1e-6, "bfloat16": 2.0**-8, "int8": 0.51 / 127}[target]
    for new, old in zip(momentum(optimizer).values(), momentum(own).values()):
        new, old = np.float64(new), np.float64(old)
        assert np.abs(new - old).max() <= error * np.abs(old).max()
    if source == target == "int8":
        codes = [slots_of(o)["dense_kernel_momentum"] for o in (own, optimizer)]
        np.testing.assert_array_equal(*codes)


def moved(dtype, **kwargs):
    """How far weights of ones are after 100 steps of a hundredth of a unit."""
    variable = keras.Variable(np.ones((16, 16)), dtype=dtype, name="kernel")
    rate = (
        0.01
        * {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 1e-3}[dtype]
    )
    optimizer = kb.BlockAdam(rate, blocking="variable", **kwargs)
    optimizer.build([variable])
    gradient = keras.ops.ones((16, 16), dtype)
    for _ in range(100):
        optimizer.apply([gradient], [variable])
    assert keras.backend.standardize_dtype(variable.dtype) == dtype
    value = np.float64(to_numpy(keras.ops.cast(variable.value, "float32")))
    return (1.0 - value.mean()) / rate


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_stochastic_rounding_of_weights(dtype):
    assert moved(dtype) == 0.0
    assert abs(moved(dtype, stochastic_rounding=True) - 100) < 20


def test_stochastic_rounding_is_of_16_bits_alone():
    plain = moved("float32")
    assert moved("float32", stochastic_rounding=True) == plain
    assert abs(plain - 100) < 1


def test_stochastic_rounding_is_repeatable():
    ends = []
    for _ in range(2):
        variables = make_variables(SHAPES, "bfloat16")
        trained(3, variables=variables, stochastic_rounding=True)
        ends.append(
            [to_numpy(keras.ops.cast(v.value, "float32")) for v in variables]
        )
    for first, second in zip(*ends):
        np.testing.assert_array_equal(first, second)
