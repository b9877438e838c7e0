"""A job that is resumed in a new process ends as one that went on, bitwise."""

import pickle

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_close
from helpers.arrays import assert_differ
from helpers.arrays import assert_same
from helpers.cases import OPTIMIZERS
from helpers.processes import run_python
from helpers.saving import checkpoint_of
from helpers.tensorflow import tf
from workers import resume as worker
from workers.resume import DEFAULT
from workers.resume import SETTINGS

if tf is not None:
    from helpers.replicas import two_replicas


def numbers_of(settings):
    """Parameters: the number of each of some settings."""
    return [
        pytest.param(
            SETTINGS.index(setting),
            id=setting.id,
            marks=[pytest.mark.tensorflow] if setting.needs_tensorflow else [],
        )
        for setting in settings
    ]


def outcomes_of(settings, folder):
    """Outcomes of training in this process, and of resuming in another."""
    numbers = [
        SETTINGS.index(setting)
        for setting in settings
        if tf is not None or not setting.needs_tensorflow
    ]
    here = {
        n: worker.outcome(worker.begin, SETTINGS[n], folder / str(n))
        for n in numbers
    }
    run_python("-m", "workers.resume", folder, *numbers)
    there = pickle.loads((folder / "outcomes.pickle").read_bytes())
    return {n: (here[n], there[n]) for n in numbers}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of(DEFAULT, tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def more_outcomes(tmp_path_factory):
    more = SETTINGS[len(DEFAULT) :]
    return outcomes_of(more, tmp_path_factory.mktemp("more"))


def assert_resumed(setting, here, there):
    for result in here, there:
        assert not isinstance(result, str), result
    (saved, losses, end), (restored, more_losses, more_end) = here, there
    assert_same(restored, saved)
    assert len(losses) == 6
    assert len(set(losses)) > 3
    assert_differ(saved, end)
    if setting.resumed:
        # The same numbers are added up, in another order.
        assert_close(more_losses, losses, 1e-5)
        assert_close(more_end, end, 1e-4, 1e-6)
    else:
        assert more_losses == losses
        assert_same(more_end, end)


@pytest.mark.parametrize("n", numbers_of(DEFAULT))
def test_resumes(n, outcomes):
    assert_resumed(SETTINGS[n], *outcomes[n])


@pytest.mark.slow
@pytest.mark.parametrize("n", numbers_of(SETTINGS[len(DEFAULT) :]))
def test_resumes_more(n, more_outcomes):
    assert_resumed(SETTINGS[n], *more_outcomes[n])


def test_every_optimizer_is_here():
    assert {cls for cls, _ in worker.OPTIMIZERS.values()} == set(OPTIMIZERS)
    assert {setting.optimizer for setting in DEFAULT} == {*worker.OPTIMIZERS}


def make_trained(optimizer):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="out")]
    )
    model.compile(optimizer, "mse", run_eagerly=True)
    for _ in range(3):
        model.train_on_batch(np.eye(3), np.ones((3, 2)))
    return model


FULL = {"use_ema": True, "gradient_accumulation_steps": 2}


@pytest.mark.tensorflow
@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
@pytest.mark.parametrize("name", [*worker.OPTIMIZERS, "Keras's Adam"])
def test_tf_checkpoint_has_all_of_the_state(name, built, tmp_path):
    def make():
        if name == "Keras's Adam":
            return keras.optimizers.Adam(0.1, **FULL)
        cls, kwargs = worker.OPTIMIZERS[name]
        return cls(
            0.1, jit_compile=False, skip_nonfinite=True, **FULL, **kwargs
        )

    model = make_trained(make())
    path = checkpoint_of(model).save(str(tmp_path / "checkpoint"))
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
    assert_same(optimizer.variables, model.optimizer.variables)
    assert_same(other.get_weights(), model.get_weights())


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", worker.OPTIMIZERS)
@pytest.mark.parametrize("how", ["export", "saved_model"])
def test_exports_with_the_optimizer_attached(name, how, tmp_path):
    cls, kwargs = worker.OPTIMIZERS[name]
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


@pytest.mark.tensorflow
def test_keras_cannot_accumulate_gradients_on_replicas():
    # Neither with our optimizers nor its own: "merge_call called while
    # defining a new graph or a tf.function", from within its `cond`. When
    # this fails, the settings of `workers/resume.py` can have it, too.
    strategy = two_replicas()
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
