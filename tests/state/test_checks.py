"""Variables and gradients that do not fit are refused, by name."""

import re

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_near
from helpers.arrays import assert_same
from helpers.arrays import refused
from helpers.arrays import to_numpy
from helpers.cases import BETAS
from helpers.cases import CASES
from helpers.cases import each_class_with
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.tensorflow import tf
from helpers.training import built
from helpers.training import graph
from keras_blockwise.state.checks import check_trainable

KERNEL = {"dense/kernel": (4, 3)}
# Of a variable of shape (4, 3).
MISFITS = [(3, 4), (12,), (6, 2), (4,), (4, 1, 3), (1, 4, 3), (2, 3), (4, 3, 1)]
BROADCAST = [(), (1,), (3,), (1, 3), (4, 1), (1, 1)]


def gradient_of(shape):
    return np.random.default_rng(2).normal(size=shape).astype("float32")


def message_of(shape):
    return re.escape(
        "must have the shape of its variable, or broadcast to it. Received: a "
        f"gradient of shape {shape} for variable 'dense/kernel' of shape (4, 3)"
    )


# Shapes of gradients.


@pytest.mark.parametrize("wrap", [lambda o: o.apply, graph], ids=["", "graph"])
@pytest.mark.parametrize("shape", MISFITS, ids=str)
def test_a_gradient_of_another_shape(shape, wrap):
    optimizer = kb.BAGM(0.1, clipnorm=1.0)
    variables = make_variables(KERNEL)
    step = wrap(built(optimizer, variables))
    with refused([*variables, *optimizer.variables], message_of(shape)):
        step(tensors([gradient_of(shape)]))


def test_a_gradient_of_another_shape_before_build():
    optimizer = kb.BAGM(0.1)
    with refused(variables := make_variables(KERNEL), message_of((3, 4))):
        optimizer.apply(tensors([gradient_of((3, 4))]), variables)
    assert not optimizer.built


@each_class_with("shape", BROADCAST)
def test_a_gradient_that_broadcasts(case, shape):
    ends = []
    shapes = {**KERNEL, "out/bias": (3,)}
    for full in (False, True):
        gradient = gradient_of(shape)
        if full:
            gradient = np.broadcast_to(gradient, (4, 3))
        optimizer = case.make(0.1, jit_compile=False)
        variables = make_variables(shapes)
        for _ in range(2):
            optimizer.apply(tensors([gradient, np.ones(3)]), variables)
        ends.append(to_numpy([*variables, *optimizer.variables]))
    assert_same(*ends)


@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_a_gradient_that_broadcasts_in_adam(shape):
    ends = []
    for optimizer in (
        kb.BlockAdam(0.1, blocking="coordinate", **BETAS),
        keras.optimizers.Adam(0.1, **BETAS),
    ):
        variables = make_variables(KERNEL)
        for _ in range(2):
            optimizer.apply(tensors([gradient_of(shape)]), variables)
        ends.append(to_numpy(variables))
    assert_near(*ends)


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2}, {"clipnorm": 0.5}], ids=str
)
def test_a_gradient_that_broadcasts_and_an_option(options):
    """It means the same as in its full shape, before all else."""
    ends = []
    for gradient in (np.ones(3), np.ones((4, 3))):
        optimizer = kb.BAGM(0.1, jit_compile=False, **options)
        variables = make_variables(KERNEL)
        for _ in range(2):
            optimizer.apply(tensors([gradient]), variables)
        ends.append(to_numpy(variables))
    assert_same(*ends)


@pytest.mark.parametrize("gradient", [2.0, [1.0, 2.0, 3.0]], ids=str)
def test_a_gradient_that_is_no_tensor(gradient):
    variables, others = make_variables(KERNEL), make_variables(KERNEL)
    kb.BAGM(0.1, jit_compile=False).apply([gradient], variables)
    full = np.broadcast_to(np.float32(gradient), (4, 3))
    kb.BAGM(0.1, jit_compile=False).apply(tensors([full]), others)
    assert_same(to_numpy(variables), to_numpy(others))


@pytest.mark.parametrize("number", [1, 3])
def test_another_number_of_gradients(number):
    optimizer = kb.BAGM(0.1)
    variables = make_variables({"a/bias": (2,), "b/bias": (2,)})
    with refused(variables, f"Received: {number} for 2 variables"):
        optimizer.apply(tensors([np.ones(2)] * number), variables)


def in_a_function(spec, gradient, jit_compile="auto"):
    """The variable after a step with a gradient of which `spec` is known."""
    optimizer = kb.BAGM(0.1, jit_compile=jit_compile)
    (variable,) = variables = make_variables(KERNEL)
    optimizer.build(variables)
    apply = tf.function(
        lambda g: optimizer.apply([g]),
        input_signature=[tf.TensorSpec(spec, tf.float32)],
        autograph=False,
    )
    apply(gradient)
    return variable


SPECS = [None, (None, 3), (4, None), (None, None)]


@pytest.mark.tensorflow
@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_shape_that_a_graph_does_not_know(spec, jit_compile):
    gradient = gradient_of((4, 3))
    ends = [
        to_numpy([in_a_function(shape, gradient, jit_compile)])
        for shape in (spec, (4, 3))
    ]
    assert_near(*ends)


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "spec, shape",
    [(None, (3,)), (None, ()), ((None, 3), (1, 3)), ((4, None), (4, 1))],
    ids=str,
)
def test_a_shape_that_turns_out_to_broadcast(spec, shape):
    gradient = gradient_of(shape)
    ends = [
        to_numpy([in_a_function(*arguments)])
        for arguments in (
            (spec, gradient),
            ((4, 3), np.broadcast_to(gradient, (4, 3))),
        )
    ]
    assert_near(*ends)


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "spec, shape",
    [
        (None, (3, 4)),
        (None, (12,)),
        (None, (1, 4, 3)),
        ((None, 3), (2, 3)),
        ((None, None), (3, 4)),
        ((None,), (12,)),
    ],
    ids=str,
)
def test_a_shape_that_turns_out_to_be_another(spec, shape):
    with pytest.raises(tf.errors.InvalidArgumentError):
        in_a_function(spec, gradient_of(shape))


@pytest.mark.tensorflow
@pytest.mark.parametrize("spec", [(None, 4), (3, None), (None, None, None)])
def test_what_a_graph_knows_of_a_shape_is_checked(spec):
    with pytest.raises(ValueError, match=message_of(spec)):
        in_a_function(spec, gradient_of([n or 3 for n in spec]))


# Variables.


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.id)
def test_a_variable_that_is_there_twice(case):
    first, second = variables = make_variables({"a/bias": (3,), "b/bias": (3,)})
    twice = [first, second, first]
    gradients = tensors([np.ones(3)] * 3)
    message = "must be in the list of variables once. Received: 'a/bias' twice"
    new = case.make()
    for call in (
        lambda: new.build(twice),
        lambda: new.apply(gradients, twice),
        lambda: new.plan(twice),
        lambda: built(case.make(), variables).apply(gradients, twice),
        lambda: new.apply([*gradients[:2], None], twice),
    ):
        with refused(variables, message):
            call()
    assert not new.built
    new.apply(gradients[:2], variables)


@pytest.mark.tensorflow
def test_a_native_variable_that_is_there_twice():
    variable = keras.Variable(np.ones(3), name="bias")
    with pytest.raises(ValueError, match="'bias.*' twice"):
        kb.BAGM().build([variable, variable.value])


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_a_variable_of_integers(dtype):
    variables = [
        *make_variables(KERNEL),
        keras.Variable(np.ones(3), dtype=dtype, trainable=False, name="codes"),
    ]
    optimizer = kb.BAGM()
    message = f"'codes' must have one.*dtype={dtype}. Leave it out of the train"
    for call in (
        lambda: optimizer.build(variables),
        lambda: optimizer.apply(tensors([np.ones((4, 3)), 1.0]), variables),
    ):
        with refused(variables, message):
            call()
    assert not optimizer.built


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1j, "dtype=complex128. Train two variables, its real and its imagin"),
        (tf and tf.complex(0.0, 1.0), "dtype=complex64. Train two variables"),
        ("text", "dtype=string. Leave it out"),
    ],
    ids=["complex128", "complex64", "string"],
)
def test_a_variable_of_other_things(value, message):
    variable = tf.Variable([value], name="z")
    for optimizer in (kb.BAGM(), kb.BAGM(jit_compile=False)):
        with pytest.raises(
            ValueError, match=f"'z' must have one of.*{message}"
        ):
            optimizer.build([variable])
        with pytest.raises(
            ValueError, match=f"'z' must have one of.*{message}"
        ):
            optimizer.apply([variable + variable], [variable])


@pytest.mark.tensorflow
@pytest.mark.parametrize("shape", [None, [None, 3]], ids=str)
def test_a_variable_whose_shape_is_not_known(shape):
    shape = tf.TensorShape(shape)
    variable = tf.Variable(tf.ones((4, 3)), shape=shape, name="w")
    message = "'w' must have a shape that is fully known.*Create it without"
    for call in (
        lambda: kb.BAGM().build([variable]),
        lambda: kb.BAGM().apply([tf.ones((4, 3))], [variable]),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_can_be_trained():
    for dtype in ("float16", "bfloat16", "float32"):
        (variable,) = make_variables(KERNEL, dtype)
        check_trainable(variable)
        (gradients,) = make_gradients(1, KERNEL)
        kb.BAGM(0.1).apply(tensors(gradients, dtype), [variable])
