"""Variables on several devices, and steps in the scope of another one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_blockwise as kb
from helpers.arrays import assert_near
from helpers.arrays import to_numpy
from helpers.cases import LAST_OF_CLASS
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import slots_of
from helpers.cases import tensors
from helpers.programs import compiled_functions
from helpers.programs import is_xla
from helpers.training import eager
from helpers.training import graph

pytestmark = pytest.mark.tensorflow
FIRST, SECOND = "/CPU:0", "/CPU:1"
# Enough small slots on each device to be kept together.
SHAPES = {
    f"dense_{i}/{name}": shape
    for i in range(16)
    for name, shape in {"kernel": (2, 3), "bias": (3,)}.items()
}
each_way = pytest.mark.parametrize(
    "wrap, jit_compile",
    [
        (eager, False),
        pytest.param(graph, True, marks=pytest.mark.slow),
        pytest.param(eager, True, marks=pytest.mark.slow),
        pytest.param(graph, False, marks=pytest.mark.slow),
    ],
)


def variables_on(device_of):
    """Variables of `SHAPES`, the layer `i` on the device `device_of(i)`."""
    variables = []
    for value, path in zip(make_variables(SHAPES), SHAPES):
        layer, name = path.split("/")
        number = int(layer.removeprefix("dense_"))
        with tf.device(device_of(number)), keras.name_scope(layer):
            variables.append(keras.Variable(value.numpy(), name=name))
    return variables


def one_device(layer):
    return FIRST


def two_devices(layer):
    return (FIRST, SECOND)[layer % 2]


def trained(case, device_of, wrap, gradients, scope=None, **kwargs):
    """The optimizer, and weights and state after some steps."""
    variables = variables_on(device_of)
    optimizer = case.make(0.1, **kwargs)
    optimizer.build(variables)
    step = wrap(optimizer)
    for given in gradients:
        with tf.device(scope):
            step(tensors(given))
    slots = slots_of(optimizer)
    return optimizer, [*to_numpy(variables), *(slots[k] for k in sorted(slots))]


def some_not_finite(gradients):
    gradients[1][-1] = np.full_like(gradients[1][-1], np.nan)
    return gradients


@each_way
@pytest.mark.parametrize(
    "case", LAST_OF_CLASS[:1], ids=lambda case: case.cls.__name__
)
def test_two_devices_equal_one(case, wrap, jit_compile):
    given = make_gradients(3, SHAPES)
    optimizer, actual = trained(
        case, two_devices, wrap, given, jit_compile=jit_compile
    )
    _, expected = trained(case, one_device, wrap, given, jit_compile=False)
    assert_near(actual, expected)
    functions = compiled_functions(optimizer)
    assert all(map(is_xla, functions))
    assert len(functions) == 2 * jit_compile


@each_way
@pytest.mark.parametrize("scheme", ["layer", "model"])
def test_groups_on_two_devices(scheme, wrap, jit_compile):
    """A layer is on one device, the model is not."""
    case, given = LAST_OF_CLASS[0], make_gradients(3, SHAPES)
    kwargs = {"blocking": scheme, "jit_compile": jit_compile}
    _, actual = trained(case, two_devices, wrap, given, **kwargs)
    kwargs["jit_compile"] = False
    _, expected = trained(case, one_device, wrap, given, **kwargs)
    assert_near(actual, expected)


@each_way
@pytest.mark.parametrize(
    "device_of", [two_devices, lambda layer: SECOND], ids=["both", "second"]
)
def test_skip_nonfinite(device_of, wrap, jit_compile):
    case, given = LAST_OF_CLASS[0], make_gradients(3, SHAPES)
    given = some_not_finite(given)
    kwargs = {"skip_nonfinite": True, "jit_compile": jit_compile}
    optimizer, actual = trained(case, device_of, wrap, given, **kwargs)
    kwargs["jit_compile"] = False
    _, expected = trained(case, one_device, wrap, given, **kwargs)
    assert_near(actual, expected)
    assert int(optimizer.iterations) == 2
    assert int(optimizer.skipped_steps) == 1


@each_way
@pytest.mark.parametrize(
    "skip_nonfinite", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_a_step_in_the_scope_of_another_device(
    skip_nonfinite, wrap, jit_compile
):
    case, given = LAST_OF_CLASS[0], make_gradients(2, SHAPES)
    kwargs = {"skip_nonfinite": skip_nonfinite, "jit_compile": jit_compile}
    optimizer, actual = trained(case, one_device, wrap, given, SECOND, **kwargs)
    kwargs["jit_compile"] = False
    _, expected = trained(case, one_device, wrap, given, **kwargs)
    assert_near(actual, expected)
    assert bool(compiled_functions(optimizer)) == jit_compile


def test_all_on_the_second_device_is_compiled():
    optimizer, _ = trained(
        LAST_OF_CLASS[0],
        lambda layer: SECOND,
        eager,
        make_gradients(1, SHAPES),
        skip_nonfinite=True,
        jit_compile=True,
    )
    assert len(compiled_functions(optimizer)) == 1


def test_slots_are_on_the_device_of_their_variable():
    with tf.device(FIRST):
        optimizer = kb.BlockAdam(amsgrad=True)
        optimizer.build(variables_on(two_devices))
    state = optimizer.block_state
    places = {
        v.value.device[-5:] for v in state.slot_variables if "small" in v.name
    }
    assert places == {"CPU:0", "CPU:1"}
    for own in ([0, 1], [2, 3]):
        batch = state.batch(own, lambda i: 0.0)
        for unit in batch.weights:
            devices = {v.value.device for v in unit.variables}
            devices |= {part.variable.value.device for part in unit.momentum}
            assert len(devices) == 1


def test_the_format_of_one_device_does_not_depend_on_it():
    formats = []
    for device in (FIRST, SECOND):
        optimizer = kb.BlockAdam(amsgrad=True)
        optimizer.build(variables_on(lambda layer, device=device: device))
        state = optimizer.block_state.slot_variables
        formats.append([(v.name, v.shape) for v in state])
    assert formats[0] == formats[1]
    assert len(formats[0]) < len(SHAPES)


def make_model(second):
    keras.utils.set_random_seed(0)
    with tf.device(FIRST):
        inputs = keras.Input((4,), dtype="int32")
        x = keras.layers.Embedding(10, 3)(inputs)
        x = keras.layers.Flatten()(x)
    with tf.device(second):
        outputs = keras.layers.Dense(2)(x)
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize(
    ("jit_compile", "skip_nonfinite"),
    [(True, False), (False, True), ("auto", True)],
)
def test_fit_of_layers_on_two_devices(jit_compile, skip_nonfinite):
    x = np.random.default_rng(0).integers(0, 10, (32, 4))
    ends = []
    for second, own in ((SECOND, jit_compile), (FIRST, False)):
        model = make_model(second)
        optimizer = kb.BAGM(
            0.01, skip_nonfinite=skip_nonfinite, jit_compile=own
        )
        model.compile(optimizer, "mse", jit_compile=False)
        model.fit(x, x[:, :2], 8, epochs=2, shuffle=False, verbose=0)
        ends.append(to_numpy(model.trainable_variables))
    assert_near(*ends)
