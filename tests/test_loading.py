"""A file that does not fit, or ends too early, changes nothing."""

import keras
import numpy as np
import pytest
import tensorflow as tf

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
    r"kernel/velocity \(1, 1\). Received: kernel/velocity \(1, 4\). Nothing"
)
MISFITS = {
    "another blocking": (block_adam, lambda: block_adam("variable"), BLOCKS),
    "another optimizer": (
        block_adam,
        lambda: other(kb.BAGM),
        "The saved state must be one of BAGM. Received: the state of "
        "BlockAdam. Nothing was loaded. Compile the model with",
    ),
    "an optimizer of Keras": (
        lambda: keras.optimizers.Adam(0.1),
        block_adam,
        "must be one of BlockAdam. Received: the state of another optimizer",
    ),
}


@pytest.mark.parametrize("format", FORMATS[:2])
@pytest.mark.parametrize("kind", MISFITS)
def test_state_that_does_not_fit(kind, format, tmp_path):
    make_saved, make, message = MISFITS[kind]
    load, _ = save(make_model(make_saved(), 2), format, tmp_path)
    assert_refused(make_model(make(), 3), load, message)


def test_tf_checkpoint_of_another_blocking(tmp_path):
    load, _ = save(make_model(block_adam(), 2), "checkpoint", tmp_path)
    model = make_model(block_adam("variable"), 3)
    assert_refused(model, load, r"\(1, 1\).*\(1, 4\)|\(1, 4\).*\(1, 1\)")


@pytest.mark.parametrize("optimizer", [kb.BAG, kb.BlockRMSprop])
def test_tf_checkpoint_of_another_optimizer(optimizer, tmp_path):
    load, _ = save(make_model(block_adam(), 2), "checkpoint", tmp_path)
    assert_refused(make_model(other(optimizer), 3), load, "hape|Unresolved")


def test_tf_checkpoint_does_not_tell_optimizers_with_equal_slots(tmp_path):
    # A limit of `tf.train.Checkpoint`, which has positions and shapes alone.
    load, _ = save(make_model(other(kb.BAGM), 2), "checkpoint", tmp_path)
    load(make_model(block_adam()))


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
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = make_model(block_adam())
    assert_put_back(model, model.variables + model.optimizer.variables)
    for variable in model.trainable_variables:
        first, second = variable.value.values
        assert np.array_equal(first, second)


def test_a_model_that_is_not_compiled():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    assert_put_back(model, model.variables)
