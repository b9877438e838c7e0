"""A step in a graph takes two calls, the second of the first variables."""

import functools

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
from helpers.programs import indices_of_calls
from helpers.replicas import check_replicas
from helpers.replicas import two_replicas
from helpers.training import eager
from helpers.training import falling
from helpers.training import graph
from helpers.training import train
from keras_blockwise.execution.plain import PlainKernels
from keras_blockwise.execution.xla_cpu import calls

pytestmark = pytest.mark.tensorflow
BAGM = functools.partial(kb.BAGM, jit_compile=True)
# The first three are a part of a layer, and of what is kept in one variable.
SHAPES = {
    f"layer_{i}/{name}": shape
    for i in range(10)
    for name, shape in {
        "kernel": (4, 3),
        "bias": (3,),
        "gamma": (5,),
        "beta": (5,),
    }.items()
}
STEPS = 3
BY_VARIABLE = {range(3, 40), range(3)}
BY_LAYER = {range(4, 40), range(4)}
ALL = {range(40)}
# One with rows, and one with matrices.
different = pytest.mark.parametrize(
    "case",
    [case for case in LAST_OF_CLASS if case.cls in (kb.BAGM, kb.BlockMuon)],
    ids=lambda case: case.cls.__name__,
)


def train_all(optimizer, wrap):
    """The variables and all state after some steps."""
    gradients = make_gradients(STEPS, SHAPES)
    return train(optimizer, make_variables(SHAPES), gradients, wrap, falling)


@pytest.mark.slow
@pytest.mark.parametrize("blocking", ["output_unit", "layer"])
@different
def test_two_calls_have_the_numbers_of_one(case, blocking):
    one, two = [
        case.make(blocking=blocking, weight_decay=0.1, jit_compile=True)
        for _ in range(2)
    ]
    ends = train_all(one, eager), train_all(two, graph)
    assert indices_of_calls(one) == ALL
    expected = BY_LAYER if blocking == "layer" else BY_VARIABLE
    assert indices_of_calls(two) == expected
    assert_near(*ends)


@pytest.mark.slow
def test_two_calls_with_the_options_of_keras():
    kwargs = {
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "global_clipnorm": 0.5,
    }
    one, two = [kb.BAGM(0.1, jit_compile=True, **kwargs) for _ in range(2)]
    assert_near(train_all(two, graph), train_all(one, eager))
    assert indices_of_calls(two) == BY_VARIABLE


def trace(optimizer, shapes):
    """The graph of a step, which is not run."""
    optimizer.build(make_variables(shapes))
    apply = tf.function(optimizer.apply, autograph=False)
    gradients = [tf.TensorSpec(shape) for shape in shapes.values()]
    return apply.get_concrete_function(gradients).graph


def test_one_call_on_the_plain_path():
    assert PlainKernels().calls(range(40)) == [slice(None)]


def test_one_call_if_all_share_an_accumulator():
    optimizer = BAGM(blocking="model")
    trace(optimizer, SHAPES)
    assert indices_of_calls(optimizer) == ALL


def test_one_call_if_all_gradients_are_needed():
    optimizer = BAGM(skip_nonfinite=True)
    trace(optimizer, SHAPES)
    assert indices_of_calls(optimizer) == ALL


def joined(optimizer, count, size=5):
    """How many gradients are joined by each operation of a graph."""
    shapes = {f"v{i}": (size,) for i in range(count)}
    return [
        len(op.inputs) - 1
        for op in trace(optimizer, shapes).get_operations()
        if op.type == "ConcatV2" and op.inputs[0].op.type == "Placeholder"
    ]


def test_vectors_are_joined():
    assert joined(BAGM(), 15) == []
    assert joined(BAGM(), 16) == [16]
    assert joined(BAGM(), 16, 4095) == [16]
    assert joined(BAGM(), 16, 4096) == []


@pytest.mark.slow
def test_the_same_numbers_eager_in_a_graph_and_compiled():
    """The three ways in turn: in a graph, the gradients are others."""
    shapes = dict(list(SHAPES.items())[:28])
    plain, mixed = [
        BAGM(blocking="output_unit", jit_compile=True) for _ in range(2)
    ]
    ends = []
    for optimizer in (plain, mixed):
        variables = make_variables(shapes)
        optimizer.build(variables)
        ways = [
            optimizer.apply,
            tf.function(optimizer.apply, autograph=False),
            tf.function(optimizer.apply, autograph=False, jit_compile=True),
        ]
        for step, gradients in enumerate(make_gradients(6, shapes)):
            way = ways[step % 3 if optimizer is mixed else 0]
            way(tensors(gradients))
        ends.append(to_numpy(variables) + list(slots_of(optimizer).values()))
    assert_near(*ends)


def test_one_call_if_the_caller_compiles():
    optimizer = kb.BAGM()
    optimizer.build(make_variables(SHAPES))
    (gradients,) = make_gradients(1, SHAPES)
    apply = tf.function(optimizer.apply, jit_compile=True, autograph=False)
    apply(tensors(gradients))
    assert indices_of_calls(optimizer) == ALL


def test_one_call_without_xla(monkeypatch):
    optimizer = kb.BAGM(jit_compile=False)
    # To call it is an error.
    monkeypatch.setattr(calls, "first_and_rest", None)
    train_all(optimizer, graph)


@pytest.mark.parametrize(
    "count, expected",
    [(31, {range(31)}), (32, {range(3, 32), range(3)})],
    ids=["31", "32"],
)
def test_few_variables_take_one_call(count, expected):
    optimizer = BAGM(blocking="variable")
    trace(optimizer, dict(list(SHAPES.items())[:count]))
    assert indices_of_calls(optimizer) == expected


def test_the_last_variables_do_not_wait_for_the_first_gradient():
    optimizer = BAGM(blocking="output_unit")
    optimizer.build(make_variables(SHAPES))
    (gradients,) = make_gradients(1, SHAPES)

    @tf.function(autograph=False)
    def step(first, *others):
        optimizer.apply([tf.identity(first, name="first"), *others])

    graph = step.get_concrete_function(*tensors(gradients)).graph

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


@pytest.mark.slow
def test_replicas_have_the_numbers_of_one_device():
    made = []

    def make():
        made.append(BAGM(0.1, blocking="layer"))
        return made[-1]

    check_replicas(two_replicas(), make, SHAPES)
    on_replicas, _ = made
    assert indices_of_calls(on_replicas) == BY_LAYER
    assert len(compiled_functions(on_replicas)) == 2 * 2
