"""A step in a graph takes two calls, the first of the last variables."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES
from cases import make_gradients
from cases import make_variables
from cases import slots_of
from cases import tensors
from replicas import two_replicas

import keras_blockwise as kb

# The middle is inside a layer, and inside what is kept in one variable.
SHAPES = {
    f"layer_{i}/{name}": shape
    for i in range(13)
    for name, shape in (("kernel", (4, 3)), ("bias", (3,)), ("gamma", (5,)))
}
STEPS = 3
BY_VARIABLE = {range(19, 39), range(19)}
BY_LAYER = {range(21, 39), range(21)}
ALL = {range(39)}


def train(optimizer, function):
    """The variables and all slots after some steps."""
    variables = make_variables(SHAPES)
    optimizer.build(variables)
    apply = optimizer.apply
    if function:
        apply = tf.function(apply, autograph=False)
    for step, gradients in enumerate(make_gradients(STEPS, SHAPES)):
        optimizer.learning_rate = 0.1 / (1 + step)
        apply(tensors(gradients, "float32"))
    values = [v.numpy() for v in variables]
    return values + list(slots_of(optimizer).values())


def calls(optimizer):
    """The positions of the variables of each compiled function."""
    return {
        range(indices[0], indices[-1] + 1)
        for indices, _ in optimizer._cache.functions
    }


@pytest.mark.parametrize("blocking", ["output_unit", "layer"])
@pytest.mark.parametrize(
    "case",
    # The last row of each class has the most state.
    {case.cls: case for case in CASES}.values(),
    ids=lambda case: case.cls.__name__,
)
def test_halves_have_the_numbers_of_the_whole(case, blocking):
    whole, halves = [
        case.make(blocking=blocking, weight_decay=0.1) for _ in range(2)
    ]
    expected = train(whole, function=False)
    actual = train(halves, function=True)
    assert calls(whole) == ALL
    assert calls(halves) == (BY_LAYER if blocking == "layer" else BY_VARIABLE)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gradient_accumulation_steps": 2},
        {"use_ema": True, "ema_overwrite_frequency": 2},
        {"global_clipnorm": 0.5},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_halves_with_the_options_of_keras(kwargs):
    expected, actual = [
        train(kb.BAGM(0.1, **kwargs), function) for function in (False, True)
    ]
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_one_call_if_all_share_an_accumulator():
    optimizer = kb.BAGM(blocking="model")
    train(optimizer, function=True)
    assert calls(optimizer) == ALL


def test_one_call_if_all_gradients_are_needed():
    optimizer = kb.BAGM(skip_nonfinite=True)
    train(optimizer, function=True)
    assert calls(optimizer) == ALL


def test_one_call_if_the_caller_compiles():
    optimizer = kb.BAGM()
    variables = make_variables(SHAPES)
    optimizer.build(variables)
    (gradients,) = make_gradients(1, SHAPES)
    apply = tf.function(optimizer.apply, jit_compile=True, autograph=False)
    apply(tensors(gradients, "float32"))
    assert calls(optimizer) == ALL


def test_one_call_without_xla(monkeypatch):
    optimizer = kb.BAGM(jit_compile=False)
    monkeypatch.setattr(optimizer, "halves", None)  # To call it is an error.
    train(optimizer, function=True)


@pytest.mark.parametrize(
    "count, expected",
    [(31, {range(31)}), (32, {range(16, 32), range(16)})],
    ids=["31", "32"],
)
def test_few_variables_take_one_call(count, expected):
    optimizer = kb.BAGM(blocking="variable")
    shapes = dict(list(SHAPES.items())[:count])
    optimizer.build(make_variables(shapes))
    (gradients,) = make_gradients(1, shapes)
    tf.function(optimizer.apply, autograph=False)(tensors(gradients, "float32"))
    assert calls(optimizer) == expected


def test_the_last_variables_do_not_wait_for_the_first_gradient():
    optimizer = kb.BAGM(blocking="output_unit")
    optimizer.build(make_variables(SHAPES))
    (gradients,) = make_gradients(1, SHAPES)

    @tf.function(autograph=False)
    def step(first, *others):
        optimizer.apply([tf.identity(first, name="first"), *others])

    graph = step.get_concrete_function(*tensors(gradients, "float32")).graph

    def needs_the_first(operation):
        seen, found = set(), [operation]
        while found:
            op = found.pop()
            if op not in seen:
                seen.add(op)
                found += [x.op for x in op.inputs] + op.control_inputs
        return graph.get_operation_by_name("first") in seen

    updates = [op for op in graph.get_operations() if "Call" in op.type]
    assert [needs_the_first(op) for op in updates] == [False, True]


def test_replicas_have_the_numbers_of_one_device():
    strategy = two_replicas()
    with strategy.scope():
        variables = make_variables(SHAPES)
        optimizer = kb.BAGM(0.1, blocking="layer")
        optimizer.build(variables)

    @tf.function(autograph=False)
    def step(gradients):
        strategy.run(
            lambda: optimizer.apply(
                [
                    # Other numbers on each replica, with the same sum.
                    (0.25 + 0.5 * replica_id()) * gradient
                    for gradient in gradients
                ]
            )
        )

    def replica_id():
        context = tf.distribute.get_replica_context()
        return tf.cast(context.replica_id_in_sync_group, "float32")

    one = kb.BAGM(0.1, blocking="layer")
    expected_variables = make_variables(SHAPES)
    for gradients in make_gradients(STEPS, SHAPES):
        step(tensors(gradients, "float32"))
        one.apply(tensors(gradients, "float32"), expected_variables)
    assert len(optimizer._cache.functions) == 4
    for variable, expected in zip(
        [*variables, *optimizer.variables],
        [*expected_variables, *one.variables],
    ):
        for value in strategy.experimental_local_results(variable.value):
            np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)


def test_fit_is_the_same_as_in_one_call():
    x, y = np.random.default_rng(0).normal(size=(2, 16, 3)).astype("float32")
    weights = []
    for skip_nonfinite in (True, False):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,))])
        for _ in range(16):
            model.add(keras.layers.Dense(3, activation="tanh"))
        optimizer = kb.BAGM(0.1, skip_nonfinite=skip_nonfinite)
        model.compile(optimizer, loss="mse", jit_compile=False)
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        assert len(optimizer._cache.functions) == 2 - skip_nonfinite
        weights.append(model.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
