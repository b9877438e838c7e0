"""What is noted of the blocks while a model trains, and how it is drawn."""

import math
import sys

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.models import mlp
from helpers.models import product_data
from helpers.models import state_of
from keras_blockwise import plots
from keras_blockwise.callbacks import monitor as monitors
from keras_blockwise.state.storage import values_by_weight

L = keras.layers
# What XLA has to compile takes TensorFlow longer than it runs.
QUICK = {"jit_compile": keras.backend.backend() == "jax"}
PATHS = ["hidden/kernel", "hidden/bias", "out/kernel", "out/bias"]
KINDS = ["step_size", "update_ratio", "floor_share"]


def compiled_mlp(optimizer=None, **kwargs):
    model = mlp(names=("hidden", "out"), name="net")
    optimizer = optimizer or kb.BlockAdam(0.01, jit_compile=False)
    model.compile(optimizer, "mse", **{**QUICK, **kwargs})
    return model


def fit(model, *own, epochs=1, steps=6):
    """The history of full batches of eight."""
    x, y = product_data(8 * steps)
    return model.fit(
        x, y, 8, epochs, verbose=0, shuffle=False, callbacks=list(own)
    ).history


def numbers(history):
    """Without the name of the model, which depends on the version of Keras."""
    return {key.replace("net/", ""): x for key, x in history.items()}


class Notes(keras.callbacks.Callback):
    """The weights and the second moments after each batch."""

    def __init__(self):
        super().__init__()
        self.weights = []
        self.velocities = []

    def on_train_batch_end(self, batch, logs=None):
        model = self.model
        self.weights.append(to_numpy(model.trainable_variables))
        values = values_by_weight(model.optimizer.block_state)
        self.velocities.append(
            {i: v + 0 for i, v in values["velocity"].items()}
        )


def test_the_numbers_of_adam():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [3, 5], [0.02, 0.01, 0.04]
    )
    optimizer = kb.BlockAdam(
        schedule,
        epsilon=0.01,
        jit_compile=False,
        learning_rate_multipliers={".*hidden/kernel": 0.5},
    )
    own, notes = kb.BlockMonitor(every=2), Notes()
    fit(compiled_mlp(optimizer), notes, own, steps=7)
    history = numbers(own.history)
    names = [f"{kind}/{path}" for path in PATHS for kind in KINDS]
    assert list(history) == ["step", *names]
    assert history["step"] == [2, 4, 6]
    for k, t in enumerate(history["step"]):
        rate = {2: 0.02, 4: 0.02, 6: 0.01}[t] * np.sqrt(1 - 0.999**t)
        old, new = notes.weights[t - 2 : t]
        for i, path in enumerate(PATHS):
            root = np.sqrt(notes.velocities[t - 1][i].ravel())
            expected = rate * (0.5 if i == 0 else 1.0) / (root + 0.01)
            np.testing.assert_allclose(
                history[f"step_size/{path}"][k],
                np.quantile(expected, (0.05, 0.25, 0.5, 0.75, 0.95)),
                1e-5,
            )
            ratio = np.linalg.norm(new[i] - old[i]) / np.linalg.norm(old[i])
            assert history[f"update_ratio/{path}"][k] == pytest.approx(
                ratio, 1e-4
            )
            share = np.mean(root <= 0.01)
            assert history[f"floor_share/{path}"][k] == pytest.approx(share)
    shares = [history[f"floor_share/{path}"] for path in PATHS]
    assert 0 < np.mean(shares) < 1


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param("auto", marks=pytest.mark.slow)]
)
def test_training_stays_as_it_is(jit_compile):
    results = []
    for watched in (True, False):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((3,)),
                L.Dense(4, activation="tanh", name="hidden"),
                L.Dropout(0.5),
                L.Dense(1, name="out"),
            ]
        )
        optimizer = kb.BAGM(
            0.01,
            use_ema=True,
            ema_overwrite_frequency=4,
            jit_compile=jit_compile,
        )
        model.compile(optimizer, "mse", **QUICK)
        own = kb.BlockMonitor(every=1)
        history = fit(model, *[own] * watched, epochs=2)
        results.append([to_numpy(state_of(model)), history["loss"]])
        assert bool(own.history) is watched
    for found, expected in zip(*results):
        assert_same(found, expected)


def test_dead_blocks_and_a_frozen_variable():
    """Of four units, two behind an activation that is off."""
    model = compiled_mlp(
        kb.BlockAdam(
            0.01,
            jit_compile=False,
            learning_rate_multipliers={".*out/.*": 0.0},
        )
    )
    hidden = model.get_layer("hidden")
    hidden.activation = keras.activations.relu
    hidden.bias.assign([-99.0, 99.0, -99.0, 99.0])
    own = kb.BlockMonitor(every=3)
    fit(model, own)
    history = numbers(own.history)
    for path, share, moves in zip(PATHS, (0.5, 0.5, 0, 0), (1, 1, 0, 0)):
        assert history[f"floor_share/{path}"][-1] == pytest.approx(
            share, abs=0.1
        )
        assert (history[f"update_ratio/{path}"][-1] > 0) == moves
    assert history["step_size/out/kernel"][-1] == (0.0,) * 5


def test_a_step_that_is_not_taken_is_followed_by_the_next():
    """One of those whose gradients are accumulated."""
    optimizer = kb.BlockAdam(
        0.01, gradient_accumulation_steps=3, jit_compile=False
    )
    own = kb.BlockMonitor(every=4)
    fit(compiled_mlp(optimizer), own, steps=12)
    history = numbers(own.history)
    assert history["step"] == [2, 3, 4]  # Of batches 4 to 6, 8, 9 and 12.
    assert all(x > 0 for x in history["update_ratio/hidden/kernel"])


@pytest.mark.slow
def test_functions_are_made_once_for_each_optimizer():
    own = kb.BlockMonitor(every=4)
    model = compiled_mlp()
    looks = []
    for _ in range(2):
        fit(model, own)
        looks.append(own._look)
    model.compile(kb.BAGM(0.01, jit_compile=False), "mse", **QUICK)
    fit(model, own)
    assert looks[0] is looks[1] is not own._look
    assert own.history["step"] == [4, 8, 12, 4]


@pytest.mark.slow
def test_a_step_that_is_left_out_is_followed_by_the_next():
    optimizer = kb.BlockAdam(0.01, skip_nonfinite=True, jit_compile=False)
    model = compiled_mlp(optimizer)
    own = kb.BlockMonitor(every=2)
    x, y = product_data(32)
    y[12:24] = np.nan  # Batches 2 and 3.
    model.fit(x, y, 8, verbose=0, shuffle=False, callbacks=[own])
    history = numbers(own.history)
    assert history["step"] == [2]
    assert np.isfinite(history["update_ratio/hidden/kernel"]).all()


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Takes one step at a time."
)
def test_several_steps_of_an_execution_are_one_change():
    model = compiled_mlp(steps_per_execution=4)
    own, notes = kb.BlockMonitor(every=6), Notes()
    fit(model, notes, own, epochs=2, steps=8)
    assert own.history["step"] == [8, 12]
    for k, (i, j) in enumerate(((0, 1), (1, 2))):
        old, new = notes.weights[i][0], notes.weights[j][0]
        expected = np.linalg.norm(new - old) / np.linalg.norm(old)
        found = numbers(own.history)["update_ratio/hidden/kernel"][k]
        assert found == pytest.approx(expected, 1e-4)


def test_no_second_moments():
    own = kb.BlockMonitor(every=2)
    model = compiled_mlp(kb.BCOS(0.01, jit_compile=False))
    fit(model, own)
    history = numbers(own.history)
    for path in PATHS:
        assert np.isnan(history[f"step_size/{path}"]).all()
        assert np.isnan(history[f"floor_share/{path}"]).all()
        assert min(history[f"update_ratio/{path}"]) > 0
    with pytest.raises(ValueError, match="keep second moments.*Received: "):
        kb.plot_blocks(model.optimizer)


@pytest.mark.slow
def test_a_loss_scale_optimizer_is_looked_into():
    inner = kb.BlockAdam(0.01, jit_compile=False)
    model = compiled_mlp(keras.optimizers.LossScaleOptimizer(inner, 8.0))
    own = kb.BlockMonitor(every=2)
    fit(model, own)
    assert own.history["step"] == [2, 4, 6]


def test_of_many_blocks_some_are_looked_at(monkeypatch):
    monkeypatch.setattr(monitors, "MOST_BLOCKS", 5)
    x = np.arange(12.0, dtype="float32")
    found = to_numpy([monitors.sample(keras.ops.convert_to_tensor(x))])[0]
    assert found.shape == (5,) and set(found) <= set(x)
    assert set(found) != set(x[:5])
    found = to_numpy([monitors.sample(keras.ops.ones((5, 1)))])[0]
    assert found.shape == (5,)


@pytest.mark.slow
def test_quantiles_of_some_blocks(monkeypatch):
    monkeypatch.setattr(monitors, "MOST_BLOCKS", 5)
    own = kb.BlockMonitor(every=4)
    blocking = {"blocking": "coordinate", "jit_compile": False}
    fit(compiled_mlp(kb.BlockAdam(0.01, **blocking)), own)
    low, *_, high = numbers(own.history)["step_size/hidden/kernel"][0]
    assert 0 < low < high


def test_what_shares_a_path_has_a_name():
    optimizer = kb.BlockAdam()
    optimizer.build([keras.Variable(np.ones(3), name="bias") for _ in "abc"])
    assert monitors.names_of(optimizer) == ["bias", "bias (2)", "bias (3)"]


@pytest.mark.parametrize("change", [0.0, 2.0])
def test_ratios_of_weights_that_were_zero(change):
    assert monitors.ratio(change, 0.0) == (np.inf if change else 0.0)
    assert monitors.ratio(change, 4.0) == change / 4


@pytest.mark.tensorflow
def test_replicas_have_the_history_of_one_device():
    from helpers.replicas import two_replicas
    from helpers.tensorflow import tf

    histories = []
    for strategy in (two_replicas(), tf.distribute.get_strategy()):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = compiled_mlp()
        own = kb.BlockMonitor(every=2)
        fit(model, own)
        histories.append(numbers(own.history))
    found, expected = histories
    assert found.keys() == expected.keys()
    assert found["step"] == [2, 4, 6]
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, 1e-4)


def test_events_for_tensorboard(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    from tensorboard.util import tensor_util

    own = kb.BlockMonitor(tmp_path, every=2)
    fit(compiled_mlp(), own)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = {tag.replace("net/", ""): tag for tag in events.Tags()["tensors"]}
    kinds = [f"step_size_{q}" for q in (5, 25, 50, 75, 95)]
    kinds += ["update_ratio", "floor_share", "log10_step_size"]
    assert tags.keys() == {f"{kind}/{path}" for kind in kinds for path in PATHS}

    def values(tag):
        own = events.Tensors(tags[tag])
        assert [event.step for event in own] == [2, 4, 6]
        return [tensor_util.make_ndarray(event.tensor_proto) for event in own]

    history = numbers(own.history)
    np.testing.assert_allclose(
        values("update_ratio/out/kernel"), history["update_ratio/out/kernel"]
    )
    medians = [q[2] for q in history["step_size/hidden/kernel"]]
    np.testing.assert_allclose(values("step_size_50/hidden/kernel"), medians)
    for buckets, median in zip(
        values("log10_step_size/hidden/kernel"), medians
    ):
        assert buckets[:, 2].sum() == 4
        assert buckets[0, 0] <= np.log10(median) <= buckets[-1, 1]


def texts_of(figure):
    figure.draw_without_rendering()
    return [
        text.get_text()
        for axes in figure.axes
        for own in (axes, *axes.child_axes)
        for text in own.get_yticklabels()
    ]


def history_of(ratios, name="net/layer", step_size=0.5):
    """As noted of variables without blocks."""
    number = len(ratios[0])
    history = {"step": list(range(100, 100 * number + 1, 100))}
    for i, own in enumerate(ratios):
        history[f"update_ratio/{name}_{i}"] = own
        history[f"step_size/{name}_{i}"] = [(step_size,) * 5] * number
        history[f"floor_share/{name}_{i}"] = [np.nan] * number
    return history


def test_the_words_beside_the_rows():
    pytest.importorskip("matplotlib")
    name = "a_long_name/" * 9
    figure = plots.draw_history(
        history_of(
            [
                [0.0, 0.0, 0.0],
                [np.inf, 1e-6, 1e-6],
                [1e-3, 1e-3, 0.0],
                [0.02, 1e-3, 1e-3],
                [0.04, 1e-3, 1e-3],
                [1e-3, 1e-3, np.nan],
            ],
            name,
        ),
        {f"{name}_{i}" for i in (0, 1, 2, 3, 4)},
    )
    texts = texts_of(figure)
    words = ["dead", "slow", "too fast", "not finite"]
    assert [text for text in texts if text in words] == words
    names = [text for text in texts if "name" in text]
    assert len(names) == 6 and max(map(len, names)) <= 37


def test_the_colours_of_what_is_off_the_scale():
    pytest.importorskip("matplotlib")
    history = history_of([[0.0, 1e-7, 1e-5, 0.1, np.inf]], step_size=np.nan)
    figure = plots.draw_history(history, ())
    ratios, sizes, _ = (own.get_images()[0] for own in figure.axes[:3])
    dead, slowest, slow, fast, fastest = map(
        tuple, ratios.to_rgba(ratios.get_array())[0]
    )
    assert dead == (0, 0, 0, 1)
    assert dead != slowest == slow != fast == fastest
    assert np.ma.getmaskarray(sizes.get_array()).all()


@pytest.mark.parametrize("sizes", [(0.06, 0.7), (0.2, 0.3), (1e-3, 4e2)])
def test_colour_bars_have_numbers_at_their_ends(sizes):
    pytest.importorskip("matplotlib")
    history = history_of([[1e-3]] * 2)
    for i, size in enumerate(sizes):
        history[f"step_size/net/layer_{i}"] = [(size,) * 5]
    bar = plots.draw_history(history, ()).axes[4]
    first, last = math.floor(math.log10(sizes[0])), math.log10(sizes[1])
    np.testing.assert_allclose(
        bar.get_xlim(), (10.0**first, 10.0 ** math.ceil(last))
    )
    assert not any(tick.label2.get_visible() for tick in bar.xaxis.minorTicks)


def test_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    model = compiled_mlp()
    own = kb.BlockMonitor(every=3)
    fit(model, own)
    for name, figure in (
        ("plot", own.plot()),
        ("blocks", kb.plot_blocks(model.optimizer)),
    ):
        path = tmp_path / f"{name}.png"
        figure.savefig(path)
        assert path.stat().st_size > 10_000
    titles = [axes.get_title().split("\n")[-1] for axes in figure.axes]
    assert titles[:4] == ["4 blocks", "4 blocks", "1 block", "1 block"]
    (image,) = figure.axes[0].get_images()
    assert image.get_array().shape == (1, 4)


def test_large_pictures_are_thinned():
    assert plots.picture_of(np.ones((3000, 4))).shape == (1000, 4)
    assert plots.picture_of(np.ones((2, 3, 1500))).shape == (6, 750)
    assert plots.picture_of(np.ones(5)).shape == (1, 5)
    assert plots.picture_of(np.ones(())).shape == (1, 1)


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "8", None])
def test_bad_numbers(every):
    with pytest.raises(ValueError, match="`every` must be an .*Received: "):
        kb.BlockMonitor(every=every)


@pytest.mark.parametrize("log_dir", [3, True, ["logs"]])
def test_bad_folders(log_dir):
    with pytest.raises(TypeError, match="`log_dir` must be .*Received: "):
        kb.BlockMonitor(log_dir)


def test_packages_that_are_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="(?s)`log_dir` .*pip install tensor"):
        kb.BlockMonitor(tmp_path / "logs")
    assert not list(tmp_path.iterdir())
    own = kb.BlockMonitor()
    own.history = history_of([[1.0]])
    with pytest.raises(ImportError, match=r"`plot` needs .*pip install .*plot"):
        own.plot()


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="`plot` must be .*every=100"):
        kb.BlockMonitor().plot()
    optimizer = kb.BlockAdam()
    with pytest.raises(ValueError, match="must be built"):
        kb.plot_blocks(optimizer)
    optimizer.build([keras.Variable(0.0)])
    for own in (optimizer, keras.optimizers.LossScaleOptimizer(optimizer)):
        with pytest.raises(ValueError, match="have taken a step.*iterations=0"):
            kb.plot_blocks(own)


@pytest.mark.parametrize("other", [keras.optimizers.SGD(), None, 3, mlp])
def test_no_optimizer_of_this_package(other):
    with pytest.raises(TypeError, match="`optimizer` must be .*Received: "):
        kb.plot_blocks(other)
    if isinstance(other, keras.optimizers.Optimizer):
        with pytest.raises(TypeError, match="`BlockMonitor` .*Received: <"):
            fit(compiled_mlp(other), kb.BlockMonitor())
