"""Models that are trained on the replicas of any `tf.distribute` strategy."""

import functools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_blockwise as kb
from helpers.arrays import assert_close
from helpers.cases import CASES
from helpers.replicas import local_values

STEPS = 20
BATCH_SIZE = 8
SCHEMES = ["variable", "output_unit", "layer", "model"]
# Where many classes are trained: blocks of entries, and of several variables.
SOME_SCHEMES = ["output_unit", "layer"]
# Sums over replicas are made in another order, and in float64.
TOLERANCE = 1e-11


def embedding_model(dtype="float64"):
    """A model with a sparse gradient, a matrix and a vector.

    It has the same names wherever it is made: some cases know layers by them.
    """
    keras.utils.set_random_seed(0)
    layers = keras.layers
    tokens = keras.Input((3,), dtype="int32")
    x = layers.Embedding(5, 2, dtype=dtype, name="embedding")(tokens)
    x = layers.Flatten(dtype=dtype)(x)
    x = layers.Dense(4, dtype=dtype, name="dense")(x)
    return keras.Model(tokens, x)


def make_batches():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, (STEPS, BATCH_SIZE, 3), "int32")
    # No two replicas have the same data.
    targets = rng.normal(0.0, 2.0, (STEPS, BATCH_SIZE, 4))
    return tokens, targets


class Result(NamedTuple):
    """What training ended with.

    Args:
        weights: The weights, as arrays.
        state: The variables of the optimizer.
        replicas: All of these, as a list of the arrays of each replica.
    """

    weights: list[np.ndarray]
    state: list[np.ndarray]
    replicas: list[list[np.ndarray]]

    @classmethod
    def of(cls, strategy, model, optimizer):
        replicas = [
            local_values(strategy, v)
            for v in [*model.variables, *optimizer.variables]
        ]
        values = [values[0] for values in replicas]
        size = len(model.variables)
        return cls(values[:size], values[size:], replicas)


def replica_step_of(strategy, pairs):
    """A step of each pair of a model and an optimizer, on one batch."""
    count = strategy.num_replicas_in_sync
    share = BATCH_SIZE // count

    def replica_step(tokens, targets):
        context = tf.distribute.get_replica_context()
        start = context.replica_id_in_sync_group * share
        tokens = tokens[start : start + share]
        targets = targets[start : start + share]
        for model, optimizer in pairs:
            with tf.GradientTape() as tape:
                errors = tf.square(model(tokens) - targets)
                loss = tf.reduce_mean(errors) / count
            weights = model.trainable_variables
            gradients = tape.gradient(loss, weights)
            optimizer.apply_gradients(zip(gradients, weights))

    return tf.function(
        lambda *batch: strategy.run(replica_step, batch), autograph=False
    )


def make_pair(make, scheme):
    model = embedding_model()
    optimizer = make(blocking=kb.Blocking.from_model(model, scheme))
    optimizer.build(model.trainable_variables)
    return model, optimizer


def train_schemes(strategy, make, schemes=SCHEMES, batches=None):
    """Weights and state after training with the blocks of each scheme."""
    with strategy.scope():
        pairs = [make_pair(make, scheme) for scheme in schemes]
    step = replica_step_of(strategy, pairs)
    for tokens, targets in zip(*(batches or make_batches())):
        step(tf.constant(tokens), tf.constant(targets))
    assert step.experimental_get_tracing_count() == 1
    return {
        scheme: Result.of(strategy, *pair)
        for scheme, pair in zip(schemes, pairs)
    }


@functools.cache
def trained_on_one_device(case_id):
    """Without a strategy, and without XLA."""
    (case,) = [case for case in CASES if case.id == case_id]
    make = functools.partial(case.make, jit_compile=False)
    return train_schemes(tf.distribute.get_strategy(), make)


def assert_same_results(results, expected, tolerance=TOLERANCE):
    assert results.keys() <= expected.keys()
    for scheme, result in results.items():
        for values in result.replicas:
            for value in values[1:]:  # Bit by bit.
                assert value.tobytes() == values[0].tobytes(), scheme
        both = expected[scheme]
        for ours, theirs in zip(
            result.weights + result.state, both.weights + both.state
        ):
            scale = max(1.0, np.abs(theirs).max())
            np.testing.assert_allclose(
                ours, theirs, tolerance, tolerance * scale, err_msg=scheme
            )


def check_one_device(results, case, num_replicas, jit_compile=True):
    # XLA decomposes matrices of float64 about as well as those of float32.
    inexact = jit_compile and case.cls is kb.AdaBlock
    tolerance = 1e-8 if inexact else TOLERANCE
    assert_same_results(results, trained_on_one_device(case.id), tolerance)
    for result in results.values():
        assert {len(values) for values in result.replicas} == {num_replicas}
        for weight, initial in zip(result.weights, embedding_model().variables):
            assert (weight != initial.numpy()).any()


OPTIONS = {
    "weight_decay": {"weight_decay": 0.5},
    "use_ema": {"use_ema": True, "ema_momentum": 0.75},
    "skip_nonfinite": {"skip_nonfinite": True},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.PiecewiseConstantDecay(
            [4, 9], [0.125, 0.5, 0.0625]
        )
    },
}


def train_with_option(strategy, option):
    def make(**kwargs):
        options = {"learning_rate": 0.01, **OPTIONS[option]}
        return kb.BlockAdam(jit_compile=False, **options, **kwargs)

    tokens, targets = make_batches()
    if option == "skip_nonfinite":
        targets[5, -1] = np.inf  # In the part of the last replica.
    return train_schemes(strategy, make, ["output_unit"], (tokens, targets))


def fit_on(strategy, options=None):
    """As users train, in float32: the model, the data and its history."""
    tokens, targets = (x.reshape(-1, x.shape[-1]) for x in make_batches())
    with strategy.scope():
        model = embedding_model("float32")
        blocking = kb.Blocking.from_model(model, "layer")
        model.compile(kb.BAGM(0.01, blocking=blocking), "mse", metrics=["mae"])
    # Every batch is cut into parts, one for each replica.
    data = tf.data.Dataset.from_tensor_slices((tokens, targets))
    data = data.batch(BATCH_SIZE).with_options(options or tf.data.Options())
    history = model.fit(
        data, epochs=2, shuffle=False, verbose=0, validation_data=data
    ).history
    return (
        history,
        model.evaluate(data, verbose=0),
        [weight.numpy() for weight in model.weights],
    )


def assert_same_fit(actual, expected):
    history, evaluation, weights = expected
    assert_close(actual[0], history, 1e-5)
    assert_close(actual[1], evaluation, 1e-5)
    assert_close(actual[2], weights, 1e-4, 1e-5)
