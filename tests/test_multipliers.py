"""Factors of the learning rate: matched, set, saved, refused."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_close
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.cases import few_classes
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.models import mlp
from helpers.saving import own_variables
from helpers.tensorflow import scope_of
from helpers.tensorflow import strategy_of
from helpers.training import built
from helpers.training import graph
from helpers.training import train

# Whatever the axes of these weights are taken for is as good as any other.
pytestmark = pytest.mark.filterwarnings("ignore:Names and shapes")

L = keras.layers
SHAPES = {"a/kernel": (3, 4), "a/bias": (4,), "b/kernel": (4, 2)}


def values_of(optimizer):
    (values,) = [v for v in optimizer.variables if "multipliers" in v.name]
    return np.float64(values).tolist()


def make(multipliers, cls=kb.BAGM, **kwargs):
    return cls(
        0.25,
        jit_compile=False,
        learning_rate_multipliers=multipliers,
        **kwargs,
    )


@few_classes
@pytest.mark.parametrize(
    ("shape", "blocking"), [((3,), "variable"), ((2, 4), (1, 2))]
)
@pytest.mark.usefixtures("same_noise")
def test_state_that_is_kept_together(case, shape, blocking):
    """As if each variable had an optimizer with a learning rate of its own."""
    many = {f"dense_{i}/kernel": shape for i in range(18)}
    many["out/bias"] = shape
    kwargs = {"blocking": blocking, "weight_decay": 0.5, "jit_compile": False}
    factors = {path: i / 8 for i, path in enumerate(many)}
    together = make_variables(many, "float64")
    gradients = make_gradients(3, many)
    optimizer = case.make(0.25, learning_rate_multipliers=factors, **kwargs)
    train(optimizer, together, gradients)
    single = make_variables(many, "float64")
    for i, factor in enumerate(factors.values()):
        own = case.make(0.25 * factor, **kwargs)
        last = make_variables({"out/bias": shape}, "float64")
        train(
            own,
            [single[i], *last],
            [[given[i], np.zeros(shape)] for given in gradients],
        )
    assert_close(to_numpy(together), to_numpy(single), 1e-12)


def test_path_beats_pattern_and_the_rest_has_one():
    optimizer = built(
        make({"a/.*": 0.5, "a/bias": 0.25}), make_variables(SHAPES)
    )
    assert values_of(optimizer) == [0.5, 0.25, 1.0]


def test_there_is_no_variable_unless_it_is_asked_for():
    optimizer = built(kb.BAGM(), make_variables(SHAPES))
    assert optimizer.learning_rate_multipliers is None
    assert not [v for v in optimizer.variables if "multipliers" in v.name]


def test_zero_freezes():
    variables = make_variables(SHAPES)
    before = to_numpy(variables)
    optimizer = make({"a/.*": 0.0}, weight_decay=0.5)
    train(optimizer, variables, make_gradients(2, SHAPES))
    assert_same(variables[:2], before[:2])
    assert np.all(to_numpy(variables)[2] != before[2])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_set_between_steps_without_a_new_trace(jit_compile):
    gradients = make_gradients(4, SHAPES)
    variables, expected = make_variables(SHAPES), make_variables(SHAPES)
    optimizer = built(make({}), variables)
    optimizer.jit_compile = jit_compile
    traces = []
    apply = optimizer.apply
    optimizer.apply = lambda *args: [traces.append(1), apply(*args)][1]
    step = graph(optimizer)
    other = built(make({}), expected)
    for number, given in enumerate(gradients):
        factor = 0.5**number
        optimizer.learning_rate_multipliers = {".*": factor}
        assert optimizer.learning_rate_multipliers == {".*": factor}
        step(tensors(given))
        other.learning_rate = 0.25 * factor
        other.apply(tensors(given))
    assert_close(to_numpy(variables), to_numpy(expected), 1e-6, 1e-6)
    if keras.backend.backend() == "tensorflow":
        assert len(traces) == 1


def test_set_again_with_keys_that_have_been_matched():
    optimizer = built(make({"a/.*": 0.5}), make_variables(SHAPES))
    optimizer.learning_rate_multipliers = {"a/.*": 0.1}
    assert optimizer.learning_rate_multipliers == {"a/.*": 0.1}
    optimizer.learning_rate_multipliers = {"b/.*": 2}
    assert values_of(optimizer) == [1.0, 1.0, 2.0]
    optimizer.learning_rate_multipliers = {}
    assert values_of(optimizer) == [1.0, 1.0, 1.0]


def test_state_has_the_factors():
    saved = built(make({"a/.*": 0.5}), make_variables(SHAPES))
    restored = built(make({"a/.*": 1.0}), make_variables(SHAPES))
    restored.load_own_variables(own_variables(saved))
    assert restored.learning_rate_multipliers == {"a/.*": 0.5}
    without = built(kb.BAGM(), make_variables(SHAPES))
    with pytest.raises(ValueError, match="learning_rate_multipliers"):
        without.load_own_variables(own_variables(saved))


def test_loaded_model_has_other_paths(tmp_path):
    model = keras.Sequential([keras.Input((3,)), L.Dense(4), L.Dense(1)])
    kernel = model.layers[0].kernel.path
    model.compile(make({kernel: 0.5}, blocking="variable"), "mse")
    model.train_on_batch(np.ones((2, 3)), np.ones((2, 1)))
    model.save(tmp_path / "model.keras")
    config = model.optimizer.get_config()
    other = keras.Sequential([keras.Input((3,)), L.Dense(4), L.Dense(1)])
    assert other.layers[0].kernel.path != kernel
    for optimizer in (
        built(kb.BAGM.from_config(config), other.trainable_variables),
        keras.models.load_model(tmp_path / "model.keras").optimizer,
    ):
        assert values_of(optimizer) == [0.5, 1.0, 1.0, 1.0]
        assert optimizer.get_config() == config
        optimizer.learning_rate_multipliers = {kernel: 0.25}
        assert values_of(optimizer)[:2] == [0.25, 1.0]


@pytest.mark.tensorflow
def test_replicas_have_the_same_factors():
    results = []
    for strategy in (strategy_of("replicas"), None):
        with scope_of(strategy):
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [keras.Input((3,)), L.Dense(4), L.Dense(2)]
            )
            multipliers = {".*bias": 0.25, f"{model.name}/.*kernel": 0.5}
            optimizer = make(multipliers, blocking="model")
            model.compile(optimizer, "mse")
        x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
        for factor in (0.5, 0.125):
            optimizer.learning_rate_multipliers = {
                **multipliers,
                ".*bias": factor,
            }
            model.train_on_batch(x, x[:, :2])
        results.append(model.get_weights())
    assert_close(*results, 1e-5)


def test_summary():
    optimizer = built(make({"a/.*": 0.5}), make_variables(SHAPES))
    report = kb.summary(optimizer)
    assert [row.multiplier for row in report.rows] == [0.5, 0.5, 1.0]
    assert "x 0.5" in str(report)
    model = mlp(3, 4, 1)
    model.compile(make({".*bias": 0.5}), "mse")
    assert {row.multiplier for row in kb.summary(model).rows} == {0.5, 1.0}
    assert "rate" not in str(kb.summary(built(kb.BAG(), model.variables)))


BAD = [
    ([("a", 1.0)], TypeError, "must map paths .*Received: .*'a', 1.0"),
    ({3: 1.0}, TypeError, "must be a string.*Received: 3"),
    ({"a(": 1.0}, ValueError, r"regular expression .*Received: 'a\('"),
    *[
        ({"a": x}, ValueError, r"\['a'\]` must be a number in \[0, inf\)")
        for x in (-0.1, np.inf, np.nan, "1", True, None)
    ],
]


@pytest.mark.parametrize(("multipliers", "error", "message"), BAD)
def test_bad_input(multipliers, error, message):
    with pytest.raises(error, match=message):
        make(multipliers)
    optimizer = built(make({}), make_variables(SHAPES))
    with pytest.raises(error, match=message):
        optimizer.learning_rate_multipliers = multipliers


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ({"c/kernel": 1.0}, r"\['c/kernel'\], which match none of\n  a/kernel"),
        ({"a/.*": 1.0, ".*bias": 1.0}, "'a/bias' must match one of the `learn"),
    ],
)
def test_keys_that_do_not_fit(multipliers, message):
    optimizer, variables = make(multipliers), make_variables(SHAPES)
    with pytest.raises(ValueError, match=message):
        optimizer.build(variables)
    assert not optimizer.built
    optimizer = built(make({}), variables)
    with pytest.raises(ValueError, match=message):
        optimizer.learning_rate_multipliers = multipliers
    assert values_of(optimizer) == [1.0, 1.0, 1.0]


def test_not_settable_without_the_argument():
    optimizer = built(kb.BAGM(), make_variables(SHAPES))
    with pytest.raises(ValueError, match="if its constructor was given one"):
        optimizer.learning_rate_multipliers = {}
    optimizer = built(make({}), make_variables(SHAPES))
    with pytest.raises(ValueError, match="Received: .*None"):
        optimizer.learning_rate_multipliers = None


@pytest.mark.parametrize(
    "config", [[], [{"a": 1.0}], [{"a": 1.0}, ["b"]], [{"a": 1.0}, 3], 3]
)
def test_damaged_config(config):
    whole = {**kb.BAG().get_config(), "learning_rate_multipliers": config}
    with pytest.raises((ValueError, TypeError), match="Received: "):
        kb.BAG.from_config(whole)


def test_layerwise_decay():
    inner = keras.Sequential(
        [
            keras.Input((3,)),
            L.Dense(4, name="first"),
            L.Dense(4, name="second"),
        ],
        name="inner",
    )
    model = keras.Sequential(
        [keras.Input((3,)), inner, L.Dropout(0.5), L.Dense(1, name="head")],
        name="net",
    )
    multipliers = kb.layerwise_decay(model, 0.5)
    paths = [v.path for v in model.trainable_variables]
    assert [multipliers[path] for path in paths] == [
        *(0.25, 0.25, 0.5, 0.5, 1.0, 1.0)
    ]
    optimizer = built(make(multipliers), model.trainable_variables)
    assert values_of(optimizer) == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    inner.layers[0].trainable = False
    assert kb.layerwise_decay(model, 0.5).keys() == {*paths[2:]}


def test_layerwise_decay_of_a_frozen_layer_around_a_trainable_one():
    """As LoRA leaves the layers of a transformer."""
    layers = [L.TimeDistributed(L.Dense(4), name="outer"), L.Dense(1)]
    model = keras.Sequential([keras.Input((2, 3)), *layers], name="net")
    outer = model.get_layer("outer")
    outer.trainable = False
    outer.layer.trainable = True
    paths = [v.path for v in model.trainable_variables]
    assert len(paths) == 4
    multipliers = kb.layerwise_decay(model, 0.5)
    assert [multipliers[path] for path in paths] == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make_model", "decay", "error", "message"),
    [
        (lambda: 3, 0.9, TypeError, "`model` must be a `keras.Model`"),
        (
            lambda: keras.Sequential([L.Dense(1)]),
            0.9,
            ValueError,
            "`model` must be built",
        ),
        *[
            (
                lambda: mlp(3, 4, 1),
                decay,
                ValueError,
                "`decay` must be a number",
            )
            for decay in (-0.1, 1.1, np.nan, "0.9", None, True)
        ],
    ],
)
def test_layerwise_decay_refuses(make_model, decay, error, message):
    with pytest.raises(error, match=f"{message}.*Received: "):
        kb.layerwise_decay(make_model(), decay)
