"""Replicas of every `tf.distribute` strategy train as one device does.

Every replica is given another part of each batch, so that a gradient that is
not summed, or that is squared before it is, ends in other weights.
"""

import functools
import importlib
import itertools
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES
from replicas import two_replicas

import keras_blockwise as kb

STEPS = 20
BATCH_SIZE = 8
SCHEMES = ["variable", "output_unit", "layer", "model"]
# Sums over replicas are made in another order, and in float64.
TOLERANCE = 1e-11


STRATEGIES = {
    "default": tf.distribute.get_strategy,
    "one device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
    "two replicas": two_replicas,
}
# The row of each class with the most state.
LAST_OF_CLASS = list({case.cls: case for case in CASES}.values())


def make_model(dtype="float64"):
    """A model with a sparse gradient, a matrix and a vector."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    tokens = keras.Input((3,), dtype="int32")
    x = layers.Embedding(5, 2, dtype=dtype)(tokens)
    x = layers.Flatten(dtype=dtype)(x)
    return keras.Model(tokens, layers.Dense(4, dtype=dtype)(x))


def make_batches():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, (STEPS, BATCH_SIZE, 3), "int32")
    # No two replicas have the same data.
    targets = rng.normal(0.0, 2.0, (STEPS, BATCH_SIZE, 4))
    return tokens, targets


class Result(NamedTuple):
    """What training ended with.

    Args:
        weights: The weights, as arrays.
        state: The variables of the optimizer.
        replicas: All of these, as a list of the arrays of each replica.
    """

    weights: list[np.ndarray]
    state: list[np.ndarray]
    replicas: list[list[np.ndarray]]

    @classmethod
    def of(cls, strategy, model, optimizer):
        replicas = [
            [v.numpy() for v in strategy.experimental_local_results(v.value)]
            for v in [*model.variables, *optimizer.variables]
        ]
        values = [values[0] for values in replicas]
        size = len(model.variables)
        return cls(values[:size], values[size:], replicas)


def make_step(strategy, pairs):
    """A step of each pair of a model and an optimizer, on one batch."""
    count = strategy.num_replicas_in_sync
    share = BATCH_SIZE // count

    def replica_step(tokens, targets):
        context = tf.distribute.get_replica_context()
        start = context.replica_id_in_sync_group * share
        tokens = tokens[start : start + share]
        targets = targets[start : start + share]
        for model, optimizer in pairs:
            with tf.GradientTape() as tape:
                errors = tf.square(model(tokens) - targets)
                loss = tf.reduce_mean(errors) / count
            weights = model.trainable_variables
            gradients = tape.gradient(loss, weights)
            optimizer.apply_gradients(zip(gradients, weights))

    return tf.function(
        lambda *batch: strategy.run(replica_step, batch), autograph=False
    )


def make_pair(make, scheme):
    model = make_model()
    optimizer = make(blocking=kb.Blocking.from_model(model, scheme))
    optimizer.build(model.trainable_variables)
    return model, optimizer


def train(strategy, make, schemes=SCHEMES, batches=None) -> dict[str, Result]:
    """Weights and state after training with the blocks of each scheme."""
    with strategy.scope():
        pairs = [make_pair(make, scheme) for scheme in schemes]
    step = make_step(strategy, pairs)
    for tokens, targets in zip(*(batches or make_batches())):
        step(tf.constant(tokens), tf.constant(targets))
    assert step.experimental_get_tracing_count() == 1
    return {
        scheme: Result.of(strategy, *pair)
        for scheme, pair in zip(schemes, pairs)
    }


@functools.cache
def trained_on_one_device(case_id):
    """Without a strategy, and without XLA."""
    (case,) = [case for case in CASES if case.id == case_id]
    make = functools.partial(case.make, jit_compile=False)
    return train(tf.distribute.get_strategy(), make)


def assert_same(results: Any, expected: Any) -> None:
    assert results.keys() <= expected.keys()
    for scheme, result in results.items():
        for values in result.replicas:
            for value in values[1:]:  # Bit by bit.
                assert value.tobytes() == values[0].tobytes(), scheme
        both = expected[scheme]
        for ours, theirs in zip(
            result.weights + result.state, both.weights + both.state
        ):
            scale = max(1.0, np.abs(theirs).max())
            np.testing.assert_allclose(
                ours, theirs, TOLERANCE, TOLERANCE * scale, err_msg=scheme
            )


def parameters():
    """Which of the updates are compiled, and whether that takes long."""
    for strategy, case in itertools.product(STRATEGIES, CASES):
        name = f"{strategy}-{case.id}"
        fast = strategy == "two replicas" and case in LAST_OF_CLASS
        marks = [] if fast else [pytest.mark.slow]
        yield pytest.param(strategy, case, True, id=name, marks=marks)
        if strategy != "default":
            last = case in LAST_OF_CLASS
            slow = last if strategy == "two replicas" else not last
            marks = [pytest.mark.slow] if slow else []
            name += "-not compiled"
            yield pytest.param(strategy, case, False, id=name, marks=marks)


@pytest.mark.parametrize(
    ("strategy", "case", "jit_compile"), list(parameters())
)
def test_equals_one_device(strategy, case, jit_compile):
    strategy = STRATEGIES[strategy]()
    make = functools.partial(case.make, jit_compile=jit_compile)
    results = train(strategy, make)
    check(results, case, strategy.num_replicas_in_sync)


def check(results, case, num_replicas):
    assert_same(results, trained_on_one_device(case.id))
    for result in results.values():
        assert {len(values) for values in result.replicas} == {num_replicas}
        for weight, initial in zip(result.weights, make_model().variables):
            assert (weight != initial.numpy()).any()


OPTIONS = {
    "weight_decay": {"weight_decay": 0.5},
    "use_ema": {"use_ema": True, "ema_momentum": 0.75},
    "skip_nonfinite": {"skip_nonfinite": True},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.PiecewiseConstantDecay(
            [4, 9], [0.125, 0.5, 0.0625]
        )
    },
}


def train_with_option(strategy, option):
    def make(**kwargs):
        options = {"learning_rate": 0.01, **OPTIONS[option]}
        return kb.BlockAdam(jit_compile=False, **options, **kwargs)

    tokens, targets = make_batches()
    if option == "skip_nonfinite":
        targets[5, -1] = np.inf  # In the part of the last replica.
    return train(strategy, make, ["output_unit"], (tokens, targets))


@functools.cache
def four_replicas(which):
    """Results of `train_four_replicas` in a process with four devices."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.pickle")
        command = [sys.executable, __file__, which, path]
        subprocess.run(command, check=True, timeout=1200)
        return pickle.loads(path.read_bytes())


def train_four_replicas(which, path):
    """Results of optimizers and options, with TensorFlow's collectives."""
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 4,
    )
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(4)])
    results = {}
    for case in LAST_OF_CLASS if which == "fast" else CASES:
        # What is not compiled here is compiled for two replicas.
        jit_compile = which == "all" or case is LAST_OF_CLASS[0]
        make = functools.partial(case.make, jit_compile=jit_compile)
        schemes = SCHEMES if which == "all" else ["output_unit", "layer"]
        results[case.id] = train(strategy, make, schemes)
    for option in OPTIONS:
        results[option] = train_with_option(strategy, option)
    path.write_bytes(pickle.dumps(results))


@pytest.mark.parametrize("case", LAST_OF_CLASS, ids=lambda case: case.id)
def test_four_replicas(case):
    check(four_replicas("fast")[case.id], case, 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_four_replicas_compiled(case):
    check(four_replicas("all")[case.id], case, 4)


@pytest.mark.parametrize("option", OPTIONS)
def test_option_on_four_replicas(option):
    expected = train_with_option(tf.distribute.get_strategy(), option)
    assert_same(four_replicas("fast")[option], expected)


@pytest.mark.parametrize("cls", [keras.optimizers.Adam, kb.BlockAdam])
def test_accumulation_fails_as_in_keras(cls):
    """If this fails, it belongs in `OPTIONS`."""
    strategy = STRATEGIES["two replicas"]()
    with strategy.scope():
        model = make_model()
        optimizer = cls(gradient_accumulation_steps=2)
        optimizer.build(model.trainable_variables)
    step = make_step(strategy, [(model, optimizer)])
    tokens, targets = (batches[0] for batches in make_batches())
    with pytest.raises(RuntimeError, match="`merge_call` called while"):
        step(tf.constant(tokens), tf.constant(targets))


def test_fit_equals_one_device():
    """As users train: `fit`, in float32, where sums differ in the order."""
    tokens, targets = (x.reshape(-1, x.shape[-1]) for x in make_batches())
    histories, weights = [], []
    for name in ["two replicas", "default"]:
        with STRATEGIES[name]().scope():
            model = make_model("float32")
            blocking = kb.Blocking.from_model(model, "layer")
            model.compile(kb.BAGM(0.01, blocking=blocking), "mse")
        # Every batch is cut into halves, one for each replica.
        data = tf.data.Dataset.from_tensor_slices((tokens, targets))
        data = data.batch(BATCH_SIZE)
        history = model.fit(data, epochs=2, shuffle=False, verbose=0)
        histories.append(history.history["loss"])
        weights.append([weight.numpy() for weight in model.weights])
    np.testing.assert_allclose(*histories, rtol=1e-5)
    for ours, theirs in zip(*weights):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def concrete_step(optimizer):
    """The step that `fit` makes of a model, under two replicas."""
    strategy = STRATEGIES["two replicas"]()
    with strategy.scope():
        model = make_model("float32")
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


def all_nodes(graph):
    """The operations of a graph and of the functions in its library."""
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


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
    graph = concrete_step(kb.BlockAdam)
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
    assert count_assignments(graph) == count_assignments(plain)
    assert count_assignments(graph, functions.keys() - inside) == (
        count_assignments(plain) - 2 * 9
    )


def test_keras_has_no_compiled_update():
    """What the test above looks for is not there without this package."""
    assert not compiled_calls(concrete_step(keras.optimizers.Adam))
    not_compiled = functools.partial(kb.BlockAdam, jit_compile=False)
    assert not compiled_calls(concrete_step(not_compiled))


def test_no_step_is_traced_again():
    strategy = STRATEGIES["two replicas"]()
    with strategy.scope():
        model, optimizer = make_pair(kb.BlockAdam, "output_unit")
    step = make_step(strategy, [(model, optimizer)])
    for i, batch in enumerate(zip(*make_batches())):
        optimizer.learning_rate = 0.01 / (1 + i)
        step(*map(tf.constant, batch))
    assert step.experimental_get_tracing_count() == 1
    assert optimizer.iterations == STEPS


if __name__ == "__main__":
    # Under its own name, so that the results can be unpickled.
    module = importlib.import_module("test_strategies")
    module.train_four_replicas(sys.argv[1], Path(sys.argv[2]))
