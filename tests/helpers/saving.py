"""Models and optimizers, saved in every format and loaded again."""

from contextlib import contextmanager

import keras

from helpers.tensorflow import tf

FORMATS = ["keras", "weights", "checkpoint"]
FILES = {"keras": "model.keras", "weights": "model.weights.h5"}


def own_variables(optimizer):
    """What the optimizer saves."""
    store = {}
    optimizer.save_own_variables(store)
    return store


def checkpoint_of(model):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def save(model, format, folder):
    """Saves, and returns the files that it made."""
    if format == "checkpoint":
        tf.train.CheckpointManager(
            checkpoint_of(model), str(folder), 1, checkpoint_name="state"
        ).save()
        return sorted(folder.glob("state-1.*"))
    path = folder / FILES[format]
    model.save(path) if format == "keras" else model.save_weights(path)
    return [path]


def load(model, format, folder):
    """Loads what `save` made into a model."""
    if format == "checkpoint":
        status = checkpoint_of(model).restore(str(folder / "state-1"))
        status.assert_consumed()
    else:
        model.load_weights(folder / FILES[format])


@contextmanager
def dtype_policy(name):
    """What is made within has this policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
