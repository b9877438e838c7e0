"""Two processes that talk over the loopback train as one device does."""

import json
import os
import pickle
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import tensorflow as tf

from helpers.cases import FEW
from helpers.processes import ROOT
from helpers.processes import TESTS
from helpers.strategies import assert_same_fit
from helpers.strategies import check_one_device
from helpers.strategies import fit_on

NUM_WORKERS = 2
pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]


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
        python_path = [str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "TF_CONFIG": json.dumps(config),
            "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        }
        paths.append(folder / f"{index}.pickle")
        command = [sys.executable, "-m", "workers.multi_worker", paths[-1]]
        processes.append(subprocess.Popen(command, cwd=TESTS, env=environment))
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * NUM_WORKERS
    return [pickle.loads(path.read_bytes()) for path in paths]


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)
def test_equals_one_device(workers, case):
    (first, *_), *others = workers
    check_one_device(first[case.id], case, 1)
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
    expected = fit_on(tf.distribute.get_strategy())
    for _, fitted, _ in workers:
        assert_same_fit(fitted, expected)


def test_keras_cannot_fit_without_help(workers):
    """If this fails, the examples need no `FitStrategy` any longer."""
    for *_, error in workers:
        assert "Attempt to convert a value (PerReplica" in error
