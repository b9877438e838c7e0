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
from helpers.models import trained_model
from helpers.processes import run_python
from helpers.saving import checkpoint_of
from helpers.tensorflow import marks_of
from helpers.tensorflow import needs_tensorflow
from helpers.tensorflow import tf
from workers import resume as worker
from workers.resume import DEFAULT
from workers.resume import SETTINGS

if tf is not None:
    from helpers.replicas import two_replicas


MORE = SETTINGS[len(DEFAULT) :]


def outcomes_of(settings, folder):
    """Outcomes of training in this process, and of resuming in another."""
    settings = [
        setting
        for setting in settings
        if tf is not None or not needs_tensorflow(setting)
    ]
    numbers = [SETTINGS.index(setting) for setting in settings]
    here = [
        worker.outcome(worker.begin, setting, folder / str(n))
        for n, setting in zip(numbers, settings)
    ]
    run_python("-m", "workers.resume", folder, *numbers)
    there = pickle.loads((folder / "outcomes.pickle").read_bytes())
    return {
        setting: (ours, there[n])
        for n, setting, ours in zip(numbers, settings, here)
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of(DEFAULT, tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def more_outcomes(tmp_path_factory):
    return outcomes_of(MORE, tmp_path_factory.mktemp("more"))


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


def each_of(settings):
    return pytest.mark.parametrize(
        "setting",
        [pytest.param(s, marks=marks_of(s), id=s.id) for s in settings],
    )


@each_of(DEFAULT)
def test_resumes(setting, outcomes):
    assert_resumed(setting, *outcomes[setting])


@pytest.mark.slow
@each_of(MORE)
def test_resumes_more(setting, more_outcomes):
    assert_resumed(setting, *more_outcomes[setting])


def test_every_optimizer_is_here():
    assert {cls for cls, _ in worker.OPTIMIZERS.values()} == set(OPTIMIZERS)
    assert {setting.optimizer for setting in SETTINGS} == {*worker.OPTIMIZERS}


FULL = {"use_ema": True, "gradient_accumulation_steps": 2}


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("name", "built"),
    [
        *((name, True) for name in [*worker.OPTIMIZERS, "Keras's Adam"]),
        *((name, False) for name in ["BlockAdam", "BAGM", "Keras's Adam"]),
    ],
)
def test_tf_checkpoint_has_all_of_the_state(name, built, tmp_path):
    def make():
        if name == "Keras's Adam":
            return keras.optimizers.Adam(0.1, **FULL)
        cls, kwargs = worker.OPTIMIZERS[name]
        return cls(
            0.1, jit_compile=False, skip_nonfinite=True, **FULL, **kwargs
        )

    model = trained_model(make(), 3)
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
@pytest.mark.parametrize("name", ["BlockAdam", "BAGM"])
@pytest.mark.parametrize("how", ["export", "saved_model"])
def test_exports_with_the_optimizer_attached(name, how, tmp_path):
    cls, kwargs = worker.OPTIMIZERS[name]
    model = trained_model(
        cls(0.1, jit_compile=False, skip_nonfinite=True, **FULL, **kwargs),
        3,
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
    model.train_on_batch(x, np.ones((3, 1)))  # And goes on.


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
