"""TensorFlow, or `None` where another backend runs the tests."""

import contextlib

import keras
import pytest

tf = None
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf  # noqa: F401

# Words in parameters: replicas of `tf.distribute`, and `tf.train.Checkpoint`.
ONLY_TENSORFLOW = {"checkpoint", "replicas"}


def needs_tensorflow(row):
    return any(isinstance(x, str) and x in ONLY_TENSORFLOW for x in row)


def marks_of(row):
    return [pytest.mark.tensorflow] if needs_tensorflow(row) else []


def marked(*rows):
    """Parameters, with the marker where one of them needs TensorFlow."""
    return [pytest.param(*row, marks=marks_of(row)) for row in rows]


def strategy_of(mode):
    """Two replicas in the mode "replicas", otherwise none."""
    if mode != "replicas":
        return None
    from helpers.replicas import two_replicas

    return two_replicas()


def scope_of(strategy):
    return strategy.scope() if strategy else contextlib.nullcontext()
