"""A file that was written under one backend goes on under another."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("worker.py")
BACKENDS = ("tensorflow", "jax", "torch")


def run(backend, *arguments):
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, WORKER, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of each backend, and the losses of the steps after them."""
    folders = {name: tmp_path_factory.mktemp(name) for name in BACKENDS}
    return {
        backend: (folder, run(backend, "write", folder))
        for backend, folder in folders.items()
    }


@pytest.mark.parametrize(
    ("writer", "reader"), itertools.permutations(BACKENDS, 2)
)
def test_the_next_losses_are_the_same(writer, reader, written):
    folder, expected = written[writer]
    received = run(reader, "read", folder)
    assert received.keys() == expected.keys()
    for name, losses in expected.items():
        np.testing.assert_allclose(received[name], losses, 1e-5)
        assert len(set(losses)) > 1


def test_a_new_model_trains_alike_under_every_backend(written):
    losses = [losses for _, losses in written.values()]
    for name in losses[0]:
        for other in losses[1:]:
            np.testing.assert_allclose(losses[0][name], other[name], 1e-5)
