"""Learning rates from the curvature of the loss: found, kept, refused."""

import itertools

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_close
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.models import mlp
from helpers.models import product_data
from helpers.models import state_of
from helpers.tensorflow import tf
from keras_blockwise import callbacks

L = keras.layers
GROUPS = {".*hidden/.*": 1.0, ".*out/.*": 1.0}
# What XLA has to compile takes TensorFlow longer than it runs.
QUICK = {"jit_compile": keras.backend.backend() == "jax"}
# Keeps every multiplier, whatever the fit.
UNMOVED = 1 - 2.0**-53


def optimizer(groups=GROUPS, learning_rate=0.01, cls=kb.BlockAdam, **kwargs):
    return cls(
        learning_rate,
        blocking="variable",
        jit_compile=False,
        learning_rate_multipliers=groups,
        **kwargs,
    )


def batches(number=4, size=8):
    x, y = product_data(number * size)
    return list(zip(np.split(x, number), np.split(y, number)))


def fit(model, *own, epochs=1, steps=4):
    """The history of full batches of eight."""
    x, y = product_data(8 * steps)
    return model.fit(
        x, y, 8, epochs, verbose=0, shuffle=False, callbacks=list(own)
    ).history


def compiled_mlp(loss="mse", **kwargs):
    model = mlp()
    model.compile(optimizer(), loss, **QUICK, **kwargs)
    return model


def scalars(loss, **kwargs):
    """A model of two weights, and the batch on which they are its outputs."""
    inputs = keras.Input((2,))
    outputs = [
        L.Dense(
            1, use_bias=False, kernel_initializer="zeros", name=name, **kwargs
        )(inputs[:, i : i + 1])
        for i, name in enumerate("ab")
    ]
    model = keras.Model(inputs, L.Concatenate()(outputs))
    groups = {".*a/kernel": 1.0, ".*b/kernel": 0.5}
    model.compile(optimizer(groups, learning_rate=0.2), loss, **QUICK)
    return model


@pytest.mark.parametrize(
    "best", [(0.66, 0.38), (0.7, 0.25), (5.0, 0.21), (0.3, 0.19), (-1.0, 0.3)]
)
def test_the_lowest_point_of_a_quadratic_loss(best):
    """One more step of its length, times x, leads to the best weights."""
    model = scalars("mse")
    x, y = np.ones((1, 2), "float32"), np.float32([best])
    weights = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: weights.append(
            np.concatenate(model.get_weights())[:, 0]
        )
    )
    own = kb.HessianInformedRates([(x, y)], every=2, smoothing=0.75)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[own, note])
    step = weights[1] - weights[0]
    lowest = (np.array(best) - weights[1]) / step
    kept = 0.75 + 0.25 * np.clip(lowest, 0.5, 2.0)
    expected = np.array([1.0, 0.5]) * np.where(lowest > 0, kept, 1.0)
    found = model.optimizer.learning_rate_multipliers
    np.testing.assert_allclose(list(found.values()), expected, 1e-3)
    for key, x, s, rate in zip(found, lowest, step, expected):
        # Of one of two outputs: A = s^2, b = x A.
        influence = s * s * x * x if x > 0 else np.nan
        for history in (own.history, own.model.history.history):
            assert history[f"rate/{key}"][-1] == pytest.approx(0.2 * rate)
            np.testing.assert_allclose(
                history[f"influence/{key}"][-1], influence, 1e-3
            )


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, p: -keras.ops.mean(p * p + p),
        lambda y, p: keras.ops.mean(p + 0 * y / 0),
        lambda y, p: keras.ops.mean(p + np.inf),
        lambda y, p: keras.ops.mean(keras.ops.sin(9 * p)),
    ],
    ids=["concave", "nan", "infinite", "no parabola"],
)
def test_a_bad_fit_keeps_the_rate(loss):
    """Of the second group, its own rate is 0, so it does not move."""
    model = scalars("mse")
    x = np.ones((1, 2), "float32")
    own = kb.HessianInformedRates([(x, x)], every=2)
    model.compute_loss = lambda x, y, p, *args, **kwargs: loss(y, p)
    model.compile(
        optimizer({".*a/kernel": 0.75, ".*b/kernel": 0.0}, 0.2),
        "mse",
        **QUICK,
    )
    history = model.fit(x, x, epochs=2, verbose=0, callbacks=[own]).history
    found = model.optimizer.learning_rate_multipliers
    assert found == {".*a/kernel": 0.75, ".*b/kernel": 0.0}
    assert own.history["batch"] == [2]
    assert np.isnan(history["influence/.*a/kernel"]).all()


@pytest.mark.parametrize(
    ("off", "good"),
    [
        (0.0, True),
        (0.145, True),  # Without the zero, R^2 would be 0.989.
        (0.2, False),  # R^2 is 0.984; about zero, it would be 0.990.
        (np.nan, False),
        (np.inf, False),
    ],
)
def test_how_good_a_fit_has_to_be(off, good):
    """R^2 is that of all points, the first one included."""
    factors = np.array([-2.0, -1.0, 1.0, 2.0])
    line = factors**2 / 2 - 0.5 * factors
    changes = line + off * np.array([1, -1, -1, 1])
    found = callbacks.fitted_parabola(tuple(factors), changes)
    assert (found is not None) is good
    if not off:
        assert found == pytest.approx((1.0, 0.5))
    for a, b in ((-1, 1), (1, -1), (0, 0)):
        changes = a * factors**2 / 2 - b * factors
        assert callbacks.fitted_parabola(tuple(factors), changes) is None


class Noise(L.Layer):
    """Draws random numbers even where nothing is trained."""

    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x):
        return x + 0.1 * keras.random.normal((3,), seed=self.seed)


def test_nothing_but_the_multipliers_changes():
    results = []
    for probes in (True, False):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((3,)),
                Noise(),
                L.Dense(4, activity_regularizer="l2", name="hidden"),
                L.BatchNormalization(),
                L.Dropout(0.5),
                L.Dense(1, kernel_regularizer="l2", name="out"),
            ]
        )
        model.compile(optimizer(), "mse", metrics=["mae"], **QUICK)
        own = kb.HessianInformedRates(
            batches(), every=2, smoothing=UNMOVED, factors=(-1, 1)
        )
        history = fit(model, *[own] * probes, epochs=2)
        state = [*state_of(model), *model.metrics_variables]
        results.append([to_numpy(state), history["loss"], history["mae"]])
        assert bool(own.history) is probes
    for found, expected in zip(*results):
        assert_same(found, expected)


def test_the_loss_is_that_of_evaluate():
    """With its regularizers and the weights of samples."""
    model = mlp(kernel_regularizer="l2", activity_regularizer="l2")
    model.add(L.Dropout(0.5))
    model.compile(optimizer(), "mse", **QUICK)
    x, y = product_data(8)
    weights = np.arange(8, dtype="float32")
    loss = callbacks.loss_function(model)
    values = [callbacks.value_of(v) for v in model.variables]
    found = float(loss(values, x, y, weights))
    expected = model.evaluate(x, y, 8, 0, weights)
    assert found == pytest.approx(expected, 1e-6)
    assert found != pytest.approx(model.evaluate(x, y, 8, 0), 1e-3)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_the_loss_is_traced_once(run_eagerly):
    model = compiled_mlp(run_eagerly=run_eagerly)
    calls = []
    compute_loss = model.compute_loss

    def counted(*args, training=True, **kwargs):
        if not training:
            calls.append(1)
        return compute_loss(*args, training=training, **kwargs)

    model.compute_loss = counted
    clear = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: calls.clear()
    )
    own = kb.HessianInformedRates(batches(), every=1, factors=(-1, 1))
    fit(model, clear, own, epochs=2, steps=2)
    measured = len(own.history["batch"])  # Not the first, if it builds.
    assert measured in (3, 4)
    graph = keras.backend.backend() != "torch" and not run_eagerly
    assert len(calls) == (1 if graph else 5 * measured)


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return batches(2)[index]


DATA = [
    lambda: batches(2),
    lambda: itertools.cycle(batches(2)),
    Sequence,
    pytest.param(
        lambda: tf.data.Dataset.from_tensor_slices(product_data(16)).batch(8),
        marks=pytest.mark.tensorflow,
    ),
]


@pytest.mark.parametrize("data", DATA)
def test_data_starts_again(data):
    own = kb.HessianInformedRates(data(), every=1)
    for _ in range(2):
        for x, y in batches(2):
            found = own._next_batch()
            assert_same(found[:2], [x, y])
            assert found[2] is None
    fit(compiled_mlp(), own)
    assert len(own.history["batch"]) >= 3


@pytest.mark.parametrize("data", [list, lambda: iter(batches(1))])
def test_data_without_another_batch(data):
    own = kb.HessianInformedRates(data(), every=2)
    with pytest.raises(ValueError, match="`data` must have batches.*Received"):
        fit(compiled_mlp(), own)


def test_a_loss_scale_optimizer_is_looked_into():
    inner = optimizer()
    model = mlp()
    wrapped = keras.optimizers.LossScaleOptimizer(inner, 8.0)
    model.compile(wrapped, "mse", **QUICK)
    own = kb.HessianInformedRates(batches(), every=2)
    fit(model, own, epochs=2)
    assert set(inner.learning_rate_multipliers.values()) != {1.0}


def test_what_was_found_is_saved(tmp_path):
    model = compiled_mlp()
    history = fit(model, kb.HessianInformedRates(batches(), every=2))
    found = model.optimizer.learning_rate_multipliers
    assert found.keys() == GROUPS.keys()
    assert all(value != 1 for value in found.values())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.learning_rate_multipliers == found
    for same in (loaded, model):
        fit(same, kb.HessianInformedRates(batches(), every=2))
    assert_close(state_of(loaded), state_of(model), 1e-6, 1e-7)
    for key, value in found.items():
        assert history[f"rate/{key}"] == pytest.approx([0.01 * value])


def test_rates_of_a_schedule_and_epochs_without_a_fit():
    model = mlp()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 4, 0.5)
    model.compile(optimizer(learning_rate=schedule), "mse", **QUICK)
    own = kb.HessianInformedRates(batches(), every=6, smoothing=UNMOVED)
    history = fit(model, own, epochs=2)
    for key in GROUPS:
        assert history[f"rate/{key}"] == pytest.approx([0.005, 0.0025])
        assert np.isnan(history[f"influence/{key}"]).tolist() == [True, False]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        *[
            ({"every": x}, ValueError, "`every` must be an integer")
            for x in (0, -1, 2.5, True, "8", None)
        ],
        *[
            ({"smoothing": x}, ValueError, r"`smoothing` must be .* \[0, 1")
            for x in (-0.1, 1, np.nan, "0.9", None)
        ],
        *[
            ({"factors": x}, ValueError, "`factors` must be at least two")
            for x in ((), (1,), (1, 1), (0, 1), (1, np.inf), (1, "2"), 3, None)
        ],
        *[
            ({"data": x}, TypeError, "`data` must be batches")
            for x in (3, None, "data", {}, np.ones(3), (np.ones(3), 1))
        ],
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=f"(?s){message}.*Received: "):
        kb.HessianInformedRates(**{"data": batches(), **kwargs})


@pytest.mark.parametrize("own", [None, {}])
def test_needs_groups(own):
    model = mlp()
    model.compile(optimizer(own), "mse")
    for other in (model.optimizer, keras.optimizers.SGD(), None):
        if other is not None:
            model.compile(other, "mse")
        with pytest.raises(ValueError, match="multipliers.*Received: "):
            fit(model, kb.HessianInformedRates(batches()))


def test_needs_single_steps():
    model = compiled_mlp(steps_per_execution=2)
    with pytest.raises(ValueError, match="must be 1 .*steps_per_execution=2"):
        fit(model, kb.HessianInformedRates(batches()))


@pytest.mark.tensorflow
def test_needs_a_single_replica():
    from helpers.replicas import two_replicas

    with two_replicas().scope():
        model = compiled_mlp()
    with pytest.raises(ValueError, match="Received: 2 replicas"):
        fit(model, kb.HessianInformedRates(batches()))
