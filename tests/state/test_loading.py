"""A file that does not fit, or ends too early, changes nothing."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_differ
from helpers.arrays import assert_same
from helpers.arrays import refused
from helpers.arrays import to_numpy
from helpers.models import block_adam
from helpers.models import mlp
from helpers.models import state_of
from helpers.models import trained_model
from helpers.saving import FORMATS
from helpers.saving import checkpoint_of
from helpers.saving import dtype_policy
from helpers.saving import load
from helpers.saving import save
from helpers.tensorflow import marked
from helpers.tensorflow import tf

if tf is not None:
    from helpers.replicas import local_values
    from helpers.replicas import two_replicas


def other(cls):
    return cls(0.1, jit_compile=False)


def assert_not_loaded(model, message, *arguments):
    with refused(state_of(model), message, Exception):
        with kb.all_or_nothing(model):
            load(model, *arguments)


each_format = pytest.mark.parametrize(
    "format", marked(*([format] for format in FORMATS))
)
BLOCKS = (
    r"The saved state must have the blocks of this optimizer. '\S+' is "
    r"kernel/velocity \(1, 1\). Received: kernel/velocity \(1, 4\). None"
)
MISFITS = {
    "another blocking": (block_adam, lambda: block_adam("variable"), BLOCKS),
    "another optimizer": (
        block_adam,
        lambda: other(kb.BAGM),
        "The saved state must be one of BAGM. Received: the state of "
        "BlockAdam. None of it was loaded. Compile the model with",
    ),
    "an optimizer of Keras": (
        lambda: keras.optimizers.Adam(0.1),
        block_adam,
        "must be one of BlockAdam. Received: the state of another optimizer",
    ),
}


@pytest.mark.parametrize(
    "kind, format",
    marked(
        *(
            (kind, format)
            for kind in MISFITS
            for format in FORMATS
            # A checkpoint of Keras has no names; see below.
            if (kind, format) != ("an optimizer of Keras", "checkpoint")
        )
    ),
)
def test_state_that_does_not_fit(kind, format, tmp_path):
    make_saved, make, message = MISFITS[kind]
    save(trained_model(make_saved(), 2), format, tmp_path)
    assert_not_loaded(trained_model(make(), 3), message, format, tmp_path)


# Optimizers whose states have the same positions and shapes as another's.
CHECKPOINTS = {
    **{
        kind: MISFITS[kind]
        for kind in ("another blocking", "another optimizer")
    },
    "BAGM as BlockAdam": (
        lambda: other(kb.BAGM),
        block_adam,
        "must be one of BlockAdam. Received: the state of BAGM. None",
    ),
    "an average as momentum": (
        block_adam,
        lambda: kb.BAG(0.1, use_ema=True, jit_compile=False),
        "must be one of BAG. Received: the state of BlockAdam. None",
    ),
    "no average": (
        block_adam,
        lambda: kb.BlockAdam(0.1, use_ema=True, jit_compile=False),
        r"average' is average \(3, 4\). Received: "
        r"kernel/momentum in the dtype of the weight \(3, 4\). "
        "None",
    ),
    "no accumulation": (
        block_adam,
        lambda: kb.BlockAdam(
            0.1, gradient_accumulation_steps=2, jit_compile=False
        ),
        r"gradient_accumulator' is gradient_accumulator \(3, 4\). Received: "
        r"kernel/momentum in the dtype of the weight \(3, 4\). None",
    ),
    "fewer variables": (
        lambda: kb.BlockRMSprop(0.1, centered=True, jit_compile=False),
        lambda: kb.BlockRMSprop(0.1, jit_compile=False),
        r"hidden.bias_velocity' is bias/velocity \(4,\). Received: "
        r"kernel/average_gradient \(1, 4\). None",
    ),
}


@pytest.mark.tensorflow
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_tf_checkpoint_is_refused_before_anything_is_loaded(kind, tmp_path):
    """Also by `restore` alone, without `kb.all_or_nothing`."""
    make_saved, make, message = CHECKPOINTS[kind]
    saved = trained_model(make_saved(), 2)
    path = checkpoint_of(saved).save(str(tmp_path / "misfit"))
    model = trained_model(make(), 3)
    save(model, "checkpoint", tmp_path)
    expected = to_numpy(state_of(model))
    model.train_on_batch(np.eye(3), np.ones((3, 1)))
    assert_differ(state_of(model), expected)
    with refused(state_of(model), message):
        checkpoint_of(model).restore(path)
    load(model, "checkpoint", tmp_path)  # What fits is loaded afterwards.
    assert_same(state_of(model), expected)


@pytest.mark.tensorflow
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_tf_checkpoint_into_an_optimizer_that_is_not_built(kind, tmp_path):
    make_saved, make, message = CHECKPOINTS[kind]
    saved = trained_model(make_saved(), 2)
    path = checkpoint_of(saved).save(str(tmp_path / "misfit"))
    model = keras.models.clone_model(saved)
    model.compile(make(), "mse", run_eagerly=True)
    with refused(state_of(model), message, Exception):
        with kb.all_or_nothing(model):
            checkpoint_of(model).restore(path)
            model.train_on_batch(np.eye(3), np.ones((3, 1)))
    assert not model.optimizer.built


@pytest.mark.tensorflow
def test_tf_checkpoint_of_an_optimizer_of_keras(tmp_path):
    """With the same state, but for the names, which Keras does not save."""
    saved = trained_model(keras.optimizers.Adam(0.1), 2)
    save(saved, "checkpoint", tmp_path)
    model = trained_model(block_adam("coordinate"), 3)
    message = "saved with the state of BlockAdam alone"
    assert_not_loaded(model, message, "checkpoint", tmp_path)


FOREIGN = {
    "Adam": keras.optimizers.Adam,
    "SGD": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    "plain SGD": keras.optimizers.SGD,
    "Adagrad": keras.optimizers.Adagrad,
    "scaled": lambda rate: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(rate)
    ),
}
FOREIGN_MESSAGE = (
    "must have been saved with a (BlockAdam|BAGM|BAG). Received: the state of "
    "another optimizer.*make a new.*convert_state"
)


def foreign_checkpoint(kind, folder, steps=2):
    model = mlp()
    model.compile(FOREIGN[kind](0.1), "mse", run_eagerly=True)
    for _ in range(steps):
        model.train_on_batch(np.eye(3), np.ones((3, 1)))
    return tf.train.Checkpoint(model=model).save(str(folder / "foreign"))


@pytest.mark.tensorflow
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        *((kind, kb.BlockAdam) for kind in FOREIGN),
        ("Adam", kb.BAGM),
        ("SGD", kb.BAG),
    ],
)
def test_tf_checkpoint_of_keras_before_build(kind, cls, steps, tmp_path):
    path = foreign_checkpoint(kind, tmp_path, steps)
    model = mlp()
    model.compile(optimizer := other(cls), "mse", run_eagerly=True)
    tf.train.Checkpoint(model=model).restore(path).expect_partial()
    with pytest.raises(ValueError, match=FOREIGN_MESSAGE):
        optimizer.build(model.trainable_variables)
    before = to_numpy(model.variables)
    with pytest.raises(ValueError, match=FOREIGN_MESSAGE):
        model.train_on_batch(np.eye(3), np.ones((3, 1)))
    assert not optimizer.built
    assert_same(model.variables, before)
    model.compile(other(cls), "mse", run_eagerly=True)  # The remedy.
    model.set_weights(model.get_weights())
    model.train_on_batch(np.eye(3), np.ones((3, 1)))


@pytest.mark.tensorflow
def test_tf_checkpoint_of_keras_into_a_built_optimizer(tmp_path):
    path = foreign_checkpoint("Adam", tmp_path)
    model = trained_model(block_adam("coordinate"), 3)
    save(model, "checkpoint", tmp_path)
    tf.train.Checkpoint(model=model).restore(path).expect_partial()
    with pytest.raises(ValueError, match=FOREIGN_MESSAGE):
        model.train_on_batch(np.eye(3), np.ones((3, 1)))
    load(model, "checkpoint", tmp_path)
    model.train_on_batch(np.eye(3), np.ones((3, 1)))


@pytest.mark.tensorflow
@pytest.mark.parametrize("built", [True, False])
def test_tf_checkpoint_without_an_optimizer(built, tmp_path):
    saved = mlp()
    path = tf.train.Checkpoint(model=saved).save(str(tmp_path / "weights"))
    model = mlp()
    model.compile(optimizer := block_adam(), "mse", run_eagerly=True)
    if built:
        optimizer.build(model.trainable_variables)
    tf.train.Checkpoint(model=model).restore(path).expect_partial()
    assert_same(model.get_weights(), saved.get_weights())
    model.train_on_batch(np.eye(3), np.ones((3, 1)))
    assert int(optimizer.iterations) == 1


@pytest.mark.tensorflow
def test_own_tf_checkpoint_after_one_of_keras(tmp_path):
    foreign = foreign_checkpoint("Adam", tmp_path)
    saved = trained_model(block_adam(), 3)
    save(saved, "checkpoint", tmp_path)
    model = mlp()
    model.compile(optimizer := block_adam(), "mse", run_eagerly=True)
    tf.train.Checkpoint(model=model).restore(foreign).expect_partial()
    checkpoint_of(model).restore(str(tmp_path / "state-1"))
    optimizer.build(model.trainable_variables)
    assert_same(state_of(model), state_of(saved))


@pytest.mark.tensorflow
def test_tf_checkpoint_from_before_the_first_step(tmp_path):
    optimizer = block_adam()
    optimizer.iterations.assign(7)
    path = tf.train.Checkpoint(optimizer=optimizer).save(str(tmp_path / "a"))
    model = trained_model(block_adam("variable"), 3)
    before = to_numpy(state_of(model))
    tf.train.Checkpoint(optimizer=model.optimizer).restore(path)
    assert int(model.optimizer.iterations) == 7
    model.optimizer.iterations.assign(3)
    assert_same(state_of(model), before)


@each_format
@pytest.mark.parametrize("kind", MISFITS)
def test_with_mixed_precision(kind, format, tmp_path):
    """Keras scales the loss then, and loads the state once more by position.

    So the error may be its own.
    """
    make_saved, make, _ = MISFITS[kind]
    with dtype_policy("mixed_float16"):
        save(trained_model(make_saved(), 2), format, tmp_path)
        model = trained_model(make(), 3)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert_not_loaded(model, "[a-z]+ [a-z]+", format, tmp_path)


@each_format
def test_truncated_file(format, tmp_path):
    paths = save(trained_model(block_adam(), 2), format, tmp_path)
    model = trained_model(block_adam(), 3)
    for path in paths:
        data = path.read_bytes()
        for size in 0, len(data) // 3, len(data) * 9 // 10, len(data) - 1:
            path.write_bytes(data[:size])
            assert_not_loaded(model, "[a-z]+ [a-z]+", format, tmp_path)
        path.write_bytes(data)
    load(model, format, tmp_path)
    path.unlink()
    message = "(?i)no such file|not found|any matching files"
    assert_not_loaded(model, message, format, tmp_path)


def test_without_it_keras_leaves_a_mixture(tmp_path):
    save(trained_model(block_adam(), 2), "weights", tmp_path)
    model = trained_model(block_adam("variable"), 3)
    before = to_numpy(state_of(model))
    with pytest.raises(ValueError, match=BLOCKS):
        load(model, "weights", tmp_path)
    assert_differ(state_of(model), before)


def test_the_state_alone_can_be_left_out(tmp_path):
    saved = trained_model(block_adam(), 2)
    saved.save_weights(tmp_path / "a.weights.h5")
    model = trained_model(block_adam("variable"), 3)
    before = to_numpy(model.optimizer.variables)
    with pytest.warns(UserWarning, match="must have the blocks"):
        with kb.all_or_nothing(model):
            model.load_weights(tmp_path / "a.weights.h5", skip_mismatch=True)
    assert_same(model.get_weights(), saved.get_weights())
    assert_same(model.optimizer.variables, before)


@each_format
def test_what_fits_is_loaded(format, tmp_path):
    saved = trained_model(block_adam(), 2)
    save(saved, format, tmp_path)
    model = trained_model(block_adam(), 3)
    with kb.all_or_nothing(model):
        load(model, format, tmp_path)
    assert_same(state_of(model), state_of(saved))


def assert_put_back(model, variables):
    with refused(variables, None, KeyboardInterrupt):
        with kb.all_or_nothing(model):
            for variable in variables:
                variable.assign(variable + 1)
            raise KeyboardInterrupt


@pytest.mark.tensorflow
def test_every_replica_is_put_back():
    strategy = two_replicas()
    with strategy.scope():
        model = trained_model(block_adam())
    assert_put_back(model, state_of(model))
    for variable in model.trainable_variables:
        np.testing.assert_array_equal(*local_values(strategy, variable))


def test_a_model_that_is_not_compiled():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    assert_put_back(model, model.variables)
