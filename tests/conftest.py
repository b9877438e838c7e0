"""Two devices, so that `MirroredStrategy` has two replicas.

Without TensorFlow, the tests with the marker `tensorflow` are left out. With
`PLAIN=1` in the environment, all but those of `xla_cpu` pass without it.
"""

import os
import re

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest

from helpers import devices
from keras_blockwise.algorithm.rounding import seeds
from keras_blockwise.state import storage

devices.set_up()
HAS_TENSORFLOW = keras.backend.backend() == "tensorflow"
WHOLE_MODULE = re.compile(r"^pytestmark = .*\bpytest\.mark\.tensorflow\b", re.M)


def pytest_ignore_collect(collection_path):
    """Modules with the marker may import TensorFlow, so they are not read."""
    if devices.PLAIN and collection_path.name == "xla_cpu":
        return True
    if HAS_TENSORFLOW or collection_path.suffix != ".py":
        return None
    return bool(WHOLE_MODULE.search(collection_path.read_text())) or None


def pytest_collection_modifyitems(config, items):
    if HAS_TENSORFLOW:
        return
    left_out = [item for item in items if item.get_closest_marker("tensorflow")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def fresh_keras():
    keras.backend.clear_session(free_memory=False)  # Collecting takes long.
    keras.utils.set_random_seed(0)


@pytest.fixture
def same_noise(monkeypatch):
    """Momentums in 8 bits are rounded with one another's random numbers.

    So a variable takes the step that it would take in an optimizer of its own.
    """
    monkeypatch.setattr(
        storage,
        "seeds",
        lambda iterations, number, shape: seeds(iterations, 0, shape),
    )
