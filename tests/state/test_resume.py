"""A job that is resumed in a new process ends as one that went on, bitwise."""

import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
import resume_worker
import tensorflow as tf
from resume_worker import DEFAULT
from resume_worker import OPTIMIZERS
from resume_worker import SETTINGS

import keras_blockwise as kb


def run(numbers, folder):
    """Outcomes of training in this process, and of resuming in another."""
    here = {
        n: resume_worker.outcome(
            resume_worker.train, SETTINGS[n], folder / str(n)
        )
        for n in numbers
    }
    command = [sys.executable, resume_worker.__file__, str(folder)]
    done = subprocess.run(
        [*command, *map(str, numbers)],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    there = pickle.loads((folder / "outcomes.pickle").read_bytes())
    return {n: (here[n], there[n]) for n in numbers}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run(range(len(DEFAULT)), tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def more_outcomes(tmp_path_factory):
    numbers = range(len(DEFAULT), len(SETTINGS))
    return run(numbers, tmp_path_factory.mktemp("more"))


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_resumed(setting, here, there):
    for result in here, there:
        assert not isinstance(result, str), result
    (saved, losses, end), (restored, more_losses, more_end) = here, there
    assert_same(restored, saved)
    assert len(losses) == 6
    assert len(set(losses)) > 3
    assert not all(map(np.array_equal, saved, end))
    if setting.resumed:
        # The same numbers are added up, in another order.
        np.testing.assert_allclose(more_losses, losses, 1e-5)
        for a, b in zip(more_end, end, strict=True):
            np.testing.assert_allclose(a, b, 1e-4, 1e-6)
    else:
        assert more_losses == losses
        assert_same(more_end, end)


@pytest.mark.parametrize(
    "n", range(len(DEFAULT)), ids=[setting.id for setting in DEFAULT]
)
def test_resumes(n, outcomes):
    assert_resumed(SETTINGS[n], *outcomes[n])


@pytest.mark.slow
@pytest.mark.parametrize(
    "n",
    range(len(DEFAULT), len(SETTINGS)),
    ids=[setting.id for setting in SETTINGS[len(DEFAULT) :]],
)
def test_resumes_more(n, more_outcomes):
    assert_resumed(SETTINGS[n], *more_outcomes[n])


def test_every_optimizer_is_here():
    classes = {cls for cls, _ in OPTIMIZERS.values()}
    optimizers = {
        value
        for value in map(vars(kb).get, kb.__all__)
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
    }
    assert classes == optimizers
    assert {setting.optimizer for setting in DEFAULT} == {*OPTIMIZERS}


def make_trained(optimizer):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="out")]
    )
    model.compile(optimizer, "mse", run_eagerly=True)
    for _ in range(3):
        model.train_on_batch(np.eye(3), np.ones((3, 2)))
    return model


FULL = {"use_ema": True, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "Keras's Adam"])
def test_tf_checkpoint_has_all_of_the_state(name, built, tmp_path):
    def make():
        if name == "Keras's Adam":
            return keras.optimizers.Adam(0.1, **FULL)
        cls, kwargs = OPTIMIZERS[name]
        return cls(
            0.1, jit_compile=False, skip_nonfinite=True, **FULL, **kwargs
        )

    model = make_trained(make())
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    other = keras.models.clone_model(model)
    # A model has its optimizer in a checkpoint as well.
    other.compile(optimizer := make(), "mse")
    if built:
        optimizer.build(other.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=other, optimizer=optimizer)
    status = checkpoint.restore(path)
    if not built:  # Each variable gets its value when it is made.
        optimizer.build(other.trainable_variables)
    status.assert_consumed()
    assert_same(
        [v.numpy() for v in optimizer.variables],
        [v.numpy() for v in model.optimizer.variables],
    )
    assert_same(other.get_weights(), model.get_weights())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", ["export", "saved_model"])
def test_exports_with_the_optimizer_attached(name, how, tmp_path):
    cls, kwargs = OPTIMIZERS[name]
    model = make_trained(
        cls(0.1, jit_compile=False, skip_nonfinite=True, **FULL, **kwargs)
    )
    x = tf.constant(np.eye(3), "float32")
    if how == "export":
        model.export(tmp_path, verbose=False)
        loaded = tf.saved_model.load(str(tmp_path))
        result = loaded.serve(x)
    else:
        tf.saved_model.save(model, str(tmp_path))
        loaded = tf.saved_model.load(str(tmp_path))
        (result,) = loaded.signatures["serving_default"](x).values()
    np.testing.assert_allclose(result, model(x), 1e-6)
    model.train_on_batch(x, np.ones((3, 2)))  # And goes on.


def test_keras_cannot_accumulate_gradients_on_replicas():
    # Neither with our optimizers nor its own: "merge_call called while
    # defining a new graph or a tf.function", from within its `cond`. When
    # this fails, the settings of `resume_worker.py` can have it, too.
    strategy = resume_worker.strategy_of("replicas")
    for make in keras.optimizers.Adam, kb.BlockAdam:
        with strategy.scope():
            weight = keras.Variable([1.0, 2.0])
            optimizer = make(gradient_accumulation_steps=2)
            optimizer.build([weight])

        @tf.function
        def step(optimizer=optimizer):
            strategy.run(lambda: optimizer.apply([tf.ones(2)]))

        with pytest.raises(RuntimeError, match="merge_call"):
            step()
