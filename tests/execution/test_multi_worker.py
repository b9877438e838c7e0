"""Two processes that talk over the loopback train as one device does."""

import functools
import json
import os
import pickle
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from cases import CASES
from test_strategies import BATCH_SIZE
from test_strategies import LAST_OF_CLASS
from test_strategies import check
from test_strategies import make_batches
from test_strategies import make_model
from test_strategies import train

import keras_blockwise as kb

EXAMPLES = Path(__file__).parents[1] / "examples"
NUM_WORKERS = 2

pytestmark = pytest.mark.slow


def main(path):
    """What a worker does."""
    # Only the examples know how to `fit` under this strategy.
    from multi_worker import FitStrategy

    strategy = FitStrategy()
    results = {}
    for case in CASES:
        # XLA does its work for every optimizer in `test_strategies.py`.
        make = functools.partial(
            case.make, jit_compile=case in LAST_OF_CLASS[:2]
        )
        results[case.id] = train(strategy, make)
    fitted = fit(strategy)
    del FitStrategy.reduce
    error = ""
    try:
        fit(strategy)
    except ValueError as e:
        error = str(e)
    path.write_bytes(pickle.dumps((results, fitted, error)))


def fit(strategy):
    """The history, the evaluation and the weights of `fit`."""
    tokens, targets = (x.reshape(-1, x.shape[-1]) for x in make_batches())
    with strategy.scope():
        model = make_model("float32")
        blocking = kb.Blocking.from_model(model, "layer")
        model.compile(kb.BAGM(0.01, blocking=blocking), "mse", metrics=["mae"])
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    data = tf.data.Dataset.from_tensor_slices((tokens, targets))
    data = data.batch(BATCH_SIZE).with_options(options)
    history = model.fit(
        data, epochs=2, shuffle=False, verbose=0, validation_data=data
    ).history
    return (
        history,
        model.evaluate(data, verbose=0),
        [weight.numpy() for weight in model.weights],
    )


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """The results of each worker."""
    folder = tmp_path_factory.mktemp("workers")
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.socket()) for _ in range(NUM_WORKERS)
        ]
        for s in sockets:
            s.bind(("localhost", 0))
        hosts = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    processes, paths = [], []
    for index in range(NUM_WORKERS):
        task = {"type": "worker", "index": index}
        config = {"cluster": {"worker": hosts}, "task": task}
        python_path = [str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "TF_CONFIG": json.dumps(config),
            "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        }
        paths.append(folder / f"{index}.pickle")
        command = [sys.executable, __file__, paths[-1]]
        processes.append(subprocess.Popen(command, env=environment))
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * NUM_WORKERS
    return [pickle.loads(path.read_bytes()) for path in paths]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_one_device(workers, case):
    (first, *_), *others = workers
    check(first[case.id], case, 1)
    # Each process has one replica: bit by bit the same as the others.
    for results, *_ in others:
        for scheme, expected in first[case.id].items():
            result = results[case.id][scheme]
            for ours, theirs in zip(
                result.weights + result.state,
                expected.weights + expected.state,
                strict=True,
            ):
                assert ours.tobytes() == theirs.tobytes()


def test_fit_equals_one_device(workers):
    history, evaluation, weights = fit(tf.distribute.get_strategy())
    for _, fitted, _ in workers:
        their_history, their_evaluation, their_weights = fitted
        assert their_history.keys() == history.keys()
        for name, values in history.items():
            np.testing.assert_allclose(their_history[name], values, rtol=1e-5)
        np.testing.assert_allclose(their_evaluation, evaluation, rtol=1e-5)
        for ours, theirs in zip(their_weights, weights):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_keras_cannot_fit_without_help(workers):
    """If this fails, the examples need no `FitStrategy` any longer."""
    for *_, error in workers:
        assert "Attempt to convert a value (PerReplica" in error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
