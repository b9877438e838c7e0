"""Replicas of every `tf.distribute` strategy train as one device does.

Every replica is given another part of each batch, so that a gradient that is
not summed, or that is squared before it is, ends in other weights.
"""

import functools
import itertools
import pickle
import tempfile
from pathlib import Path

import keras
import pytest
import tensorflow as tf

import keras_blockwise as kb
from helpers.cases import LAST_OF_CLASS
from helpers.cases import is_quick
from helpers.processes import run_python
from helpers.programs import all_nodes
from helpers.replicas import two_replicas
from helpers.strategies import OPTIONS
from helpers.strategies import STEPS
from helpers.strategies import assert_same_fit
from helpers.strategies import assert_same_results
from helpers.strategies import check_one_device
from helpers.strategies import embedding_model
from helpers.strategies import fit_on
from helpers.strategies import make_batches
from helpers.strategies import make_pair
from helpers.strategies import replica_step_of
from helpers.strategies import train_schemes
from helpers.strategies import train_with_option

pytestmark = pytest.mark.tensorflow
STRATEGIES = {
    "default": tf.distribute.get_strategy,
    "one device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
    "two replicas": two_replicas,
}


def parameters():
    """Of the classes by default; `test_four_replicas` has all of them."""
    cases = [case for case in LAST_OF_CLASS if is_quick(case)]
    for strategy, case in itertools.product(STRATEGIES, cases):
        name, replicas = f"{strategy}-{case.id}", strategy == "two replicas"
        quick = replicas and case.cls is kb.BAGM
        marks = () if quick else pytest.mark.slow
        yield pytest.param(strategy, case, True, id=name, marks=marks)
        if replicas:
            name += "-not compiled"
            marks = pytest.mark.slow
            yield pytest.param(strategy, case, False, id=name, marks=marks)


@pytest.mark.parametrize(
    ("strategy", "case", "jit_compile"), list(parameters())
)
def test_equals_one_device(strategy, case, jit_compile):
    strategy = STRATEGIES[strategy]()
    make = functools.partial(case.make, jit_compile=jit_compile)
    results = train_schemes(strategy, make)
    replicas = strategy.num_replicas_in_sync
    check_one_device(results, case, replicas, jit_compile)


@functools.cache
def four_replicas():
    """Results of `workers.four_replicas`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.pickle")
        run_python("-m", "workers.four_replicas", path)
        return pickle.loads(path.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("case", LAST_OF_CLASS, ids=lambda case: case.id)
def test_four_replicas(case):
    check_one_device(four_replicas()[case.id], case, 4)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_option_on_four_replicas(option):
    expected = train_with_option(tf.distribute.get_strategy(), option)
    assert_same_results(four_replicas()[option], expected)


@pytest.mark.parametrize("cls", [keras.optimizers.Adam, kb.BlockAdam])
def test_accumulation_fails_as_in_keras(cls):
    """If this fails, it belongs in `OPTIONS`."""
    strategy = two_replicas()
    with strategy.scope():
        model = embedding_model()
        optimizer = cls(gradient_accumulation_steps=2)
        optimizer.build(model.trainable_variables)
    step = replica_step_of(strategy, [(model, optimizer)])
    tokens, targets = (batches[0] for batches in make_batches())
    with pytest.raises(RuntimeError, match="`merge_call` called while"):
        step(tf.constant(tokens), tf.constant(targets))


@pytest.mark.slow
def test_fit_equals_one_device():
    """As users train: `fit`, in float32, where sums differ in the order."""
    expected = fit_on(tf.distribute.get_strategy())
    assert_same_fit(fit_on(two_replicas()), expected)


def concrete_step(optimizer):
    """The step that `fit` makes of a model, under two replicas."""
    strategy = two_replicas()
    with strategy.scope():
        model = embedding_model("float32")
        model.compile(optimizer(), "mse")
        model.optimizer.build(model.trainable_variables)
    tokens, targets = (batches[0] for batches in make_batches())
    data = tf.data.Dataset.from_tensors((tokens, targets)).repeat(2)
    batch = next(iter(strategy.experimental_distribute_dataset(data)))
    step = tf.function(
        lambda data: strategy.run(model.train_step, args=(data,)),
        autograph=False,
    )
    return step.get_concrete_function(batch).graph.as_graph_def()


def compiled_calls(graph):
    """The nodes that call a function which XLA has to compile."""
    return [
        node
        for node in all_nodes(graph)
        if node.attr["_XlaMustCompile"].b and "f" in node.attr
    ]


def count_assignments(graph, functions=None):
    """How often a graph assigns, with all or some of its functions."""
    nodes = list(graph.node)
    for function in graph.library.function:
        if functions is None or function.signature.name in functions:
            nodes += function.node_def
    return sum(node.op == "AssignVariableOp" for node in nodes)


def test_each_replica_calls_a_compiled_update():
    graph = concrete_step(lambda: kb.BlockAdam(jit_compile=True))
    calls = compiled_calls(graph)
    devices = [tf.DeviceSpec.from_string(call.device) for call in calls]
    assert {device.device_index for device in devices} == {0, 1}
    assert len(calls) == 2

    # Three weights, their momentum and their velocity, all within the call.
    functions = {f.signature.name: f for f in graph.library.function}
    inside = {call.attr["f"].func.name for call in calls}
    for call in calls:
        body = functions[call.attr["f"].func.name]
        operations = [node.op for node in body.node_def]
        assert operations.count("AssignVariableOp") == 9
        # Nothing that XLA, or a TPU, would have to ask the host for.
        assert not [op for op in operations if "PyFunc" in op]
        for argument in body.attr["_input_shapes"].list.shape:
            assert not argument.unknown_rank
            assert all(dim.size >= 0 for dim in argument.dim)
    # Nor is anything of the update left outside.
    plain = concrete_step(functools.partial(kb.BlockAdam, jit_compile=False))
    assert count_assignments(graph, functions.keys() - inside) == (
        count_assignments(plain) - 2 * 9
    )
    # The replicas share one function.
    assert len(inside) == 1


def test_keras_has_no_compiled_update():
    """What the test above looks for is not there without this package."""
    assert not compiled_calls(concrete_step(keras.optimizers.Adam))
    not_compiled = functools.partial(kb.BlockAdam, jit_compile=False)
    assert not compiled_calls(concrete_step(not_compiled))


def test_no_step_is_traced_again():
    strategy = two_replicas()
    with strategy.scope():
        model, optimizer = make_pair(kb.BlockAdam, "output_unit")
    step = replica_step_of(strategy, [(model, optimizer)])
    for i, batch in enumerate(zip(*make_batches())):
        optimizer.learning_rate = 0.01 / (1 + i)
        step(*map(tf.constant, batch))
    assert step.experimental_get_tracing_count() == 1
    assert optimizer.iterations == STEPS


def test_no_parameter_servers(monkeypatch):
    """With another strategy in its place, which needs no servers."""
    strategy = STRATEGIES["one device"]()
    name = "ParameterServerStrategy"
    monkeypatch.setattr(tf.distribute, name, type(strategy))
    optimizer = kb.BAG()
    with strategy.scope():
        with pytest.raises(ValueError, match=f"BAG must not.*`{name}`.*Take"):
            kb.BAG()
        with pytest.raises(ValueError, match=f"BAG must not.*`{name}`.*Take"):
            optimizer.build([keras.Variable(1.0)])
