"""A file that does not fit, or ends too early, changes nothing."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from replicas import two_replicas

import keras_blockwise as kb


def make_model(optimizer, steps=0):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="hidden"),
            keras.layers.Dense(1, name="out"),
        ]
    )
    model.compile(optimizer, "mse", run_eagerly=True)
    optimizer.build(model.trainable_variables)
    for _ in range(steps):
        model.train_on_batch(np.eye(3), np.ones((3, 1)))
    return model


def block_adam(blocking="output_unit"):
    return kb.BlockAdam(0.1, blocking=blocking, jit_compile=False)


def other(cls):
    return cls(0.1, jit_compile=False)


def everything(model):
    return [v.numpy() for v in model.variables + model.optimizer.variables]


def same(actual, expected):
    pairs = zip(actual, expected, strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def save(model, format, folder):
    """Saves, and returns what loads it and the files that it made."""
    if format == "checkpoint":
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(
            str(folder / "state")
        )

        def load(model):
            tf.train.Checkpoint(model=model, optimizer=model.optimizer).restore(
                path
            ).assert_consumed()

        return load, sorted(folder.glob("state-1.*"))
    path = folder / {"keras": "a.keras", "weights": "a.weights.h5"}[format]
    model.save(path) if format == "keras" else model.save_weights(path)
    return lambda model: model.load_weights(path), [path]


def assert_refused(model, load, message):
    before = everything(model)
    with pytest.raises(Exception, match=message):
        with kb.all_or_nothing(model):
            load(model)
    assert same(everything(model), before)


FORMATS = ["keras", "weights", "checkpoint"]
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
    [
        (kind, format)
        for kind in MISFITS
        for format in FORMATS
        # A checkpoint of Keras has no names; see below.
        if (kind, format) != ("an optimizer of Keras", "checkpoint")
    ],
)
def test_state_that_does_not_fit(kind, format, tmp_path):
    make_saved, make, message = MISFITS[kind]
    load, _ = save(make_model(make_saved(), 2), format, tmp_path)
    assert_refused(make_model(make(), 3), load, message)


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
        r"average' is average \(3, 4\). Received: kernel/momentum \(3, 4\). "
        "None",
    ),
    "no accumulation": (
        block_adam,
        lambda: kb.BlockAdam(
            0.1, gradient_accumulation_steps=2, jit_compile=False
        ),
        r"gradient_accumulator' is gradient_accumulator \(3, 4\). Received: "
        r"kernel/momentum \(3, 4\). None",
    ),
    "fewer variables": (
        lambda: kb.BlockRMSprop(0.1, centered=True, jit_compile=False),
        lambda: kb.BlockRMSprop(0.1, jit_compile=False),
        r"hidden.bias_velocity' is bias/velocity \(4,\). Received: "
        r"kernel/average_gradient \(1, 4\). None",
    ),
}


def checkpoint_of(model):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_tf_checkpoint_is_refused_before_anything_is_loaded(kind, tmp_path):
    """Also by `restore` alone, without `kb.all_or_nothing`."""
    make_saved, make, message = CHECKPOINTS[kind]
    saved = make_model(make_saved(), 2)
    path = checkpoint_of(saved).save(str(tmp_path / "misfit"))
    model = make_model(make(), 3)
    load, _ = save(model, "checkpoint", tmp_path)
    expected = everything(model)
    model.train_on_batch(np.eye(3), np.ones((3, 1)))
    before = everything(model)
    assert not same(before, expected)
    with pytest.raises(ValueError, match=message):
        checkpoint_of(model).restore(path)
    assert same(everything(model), before)
    load(model)  # What fits is loaded afterwards.
    assert same(everything(model), expected)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_tf_checkpoint_into_an_optimizer_that_is_not_built(kind, tmp_path):
    make_saved, make, message = CHECKPOINTS[kind]
    saved = make_model(make_saved(), 2)
    path = checkpoint_of(saved).save(str(tmp_path / "misfit"))
    model = keras.models.clone_model(saved)
    model.compile(make(), "mse", run_eagerly=True)

    def load(model):
        checkpoint_of(model).restore(path)
        model.train_on_batch(np.eye(3), np.ones((3, 1)))

    assert_refused(model, load, message)
    assert not model.optimizer.built


def test_tf_checkpoint_of_an_optimizer_of_keras(tmp_path):
    """With the same state, but for the names, which Keras does not save."""
    saved = make_model(keras.optimizers.Adam(0.1), 2)
    load, _ = save(saved, "checkpoint", tmp_path)
    model = make_model(block_adam("coordinate"), 3)
    assert_refused(model, load, "saved with the state of BlockAdam alone")


def test_tf_checkpoint_from_before_the_first_step(tmp_path):
    optimizer = block_adam()
    optimizer.iterations.assign(7)
    path = tf.train.Checkpoint(optimizer=optimizer).save(str(tmp_path / "a"))
    model = make_model(block_adam("variable"), 3)
    before = everything(model)
    tf.train.Checkpoint(optimizer=model.optimizer).restore(path)
    assert model.optimizer.iterations.numpy() == 7
    model.optimizer.iterations.assign(3)
    assert same(everything(model), before)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", MISFITS)
def test_with_mixed_precision(kind, format, tmp_path):
    """Keras scales the loss then, and loads the state once more by position.

    So the error may be its own.
    """
    make_saved, make, _ = MISFITS[kind]
    keras.config.set_dtype_policy("mixed_float16")
    try:
        load, _ = save(make_model(make_saved(), 2), format, tmp_path)
        model = make_model(make(), 3)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert_refused(model, load, "[a-z]+ [a-z]+")
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_file(format, tmp_path):
    load, paths = save(make_model(block_adam(), 2), format, tmp_path)
    model = make_model(block_adam(), 3)
    for path in paths:
        data = path.read_bytes()
        for size in 0, len(data) // 3, len(data) * 9 // 10, len(data) - 1:
            path.write_bytes(data[:size])
            assert_refused(model, load, "[a-z]+ [a-z]+")
        path.write_bytes(data)
    load(model)
    path.unlink()
    assert_refused(model, load, "(?i)no such file|not found|any matching files")


def test_without_it_keras_leaves_a_mixture(tmp_path):
    load, _ = save(make_model(block_adam(), 2), "weights", tmp_path)
    model = make_model(block_adam("variable"), 3)
    before = everything(model)
    with pytest.raises(ValueError, match=BLOCKS):
        load(model)
    assert not same(everything(model), before)


def test_the_state_alone_can_be_left_out(tmp_path):
    saved = make_model(block_adam(), 2)
    saved.save_weights(tmp_path / "a.weights.h5")
    model = make_model(block_adam("variable"), 3)
    before = everything(model)
    with pytest.warns(UserWarning, match="must have the blocks"):
        with kb.all_or_nothing(model):
            model.load_weights(tmp_path / "a.weights.h5", skip_mismatch=True)
    assert same(model.get_weights(), saved.get_weights())
    count = len(model.variables)
    assert same(everything(model)[count:], before[count:])


def test_what_fits_is_loaded(tmp_path):
    for format in FORMATS:
        saved = make_model(block_adam(), 2)
        load, _ = save(saved, format, tmp_path)
        model = make_model(block_adam(), 3)
        with kb.all_or_nothing(model):
            load(model)
        assert same(everything(model), everything(saved))


def assert_put_back(model, variables):
    before = [v.numpy() for v in variables]
    with pytest.raises(KeyboardInterrupt):
        with kb.all_or_nothing(model):
            for variable in variables:
                variable.assign(variable + 1)
            raise KeyboardInterrupt
    assert same([v.numpy() for v in variables], before)


def test_every_replica_is_put_back():
    with two_replicas().scope():
        model = make_model(block_adam())
    assert_put_back(model, model.variables + model.optimizer.variables)
    for variable in model.trainable_variables:
        first, second = variable.value.values
        assert np.array_equal(first, second)


def test_a_model_that_is_not_compiled():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    assert_put_back(model, model.variables)
