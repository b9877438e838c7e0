"""`skip_nonfinite`: a step with a NaN or an infinity leaves no trace."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES
from cases import Case
from cases import make_gradients
from cases import make_variables
from replicas import two_replicas

import keras_blockwise as kb

# Every class, with all the state it can have; groups and their own blocks.
ROWS = [
    Case(kb.BlockAdam, {"amsgrad": True}),
    Case(kb.AdamMini),
    Case(kb.BAGM, {"accumulator": "polynomial", "blocking": "layer"}),
    Case(kb.BAG, {"blocking": "model"}),
    Case(kb.BlockRMSprop, {"centered": True, "momentum": 0.5}),
]
# The last cannot be squared in float32, so the state could not hold it.
BAD_VALUES = [np.nan, np.inf, -np.inf, 1e30]
GOOD = make_gradients(3)

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
each_jit = pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])


def spoiled(gradients, value):
    """The gradients with one bad entry, in the variable in the middle."""
    gradients = [g.copy() for g in gradients]
    gradients[1][-1] = value
    return gradients


class Run:
    """An optimizer and weights that can be put back to where they were."""

    def __init__(self, optimizer, weights, strategy=None):
        self.optimizer = optimizer
        self.weights = weights
        self.strategy = strategy or tf.distribute.get_strategy()
        with self.strategy.scope():
            optimizer.build(weights)

    @property
    def variables(self):
        return self.weights + self.optimizer.variables

    def values(self):
        """The numbers on every replica, all but the count of skipped steps."""
        return [
            [np.array(x) for x in self.strategy.experimental_local_results(v)]
            for v in (variable.value for variable in self.variables)
            if v is not self.optimizer.skipped_steps.value
        ]

    def skipped(self):
        """The count on each replica."""
        count = self.optimizer.skipped_steps.value
        results = self.strategy.experimental_local_results(count)
        return [int(result) for result in results]

    def put_back(self, numbers):
        for variable, number in zip(self.variables, numbers):
            variable.assign(number)


def make_eager(optimizer, weights):
    run = Run(optimizer, weights)
    run.step = lambda gradients: optimizer.apply(
        [tf.constant(g, "float32") for g in gradients]
    )
    return run


def make_function(optimizer, weights):
    run = make_eager(optimizer, weights)
    function = tf.function(lambda *gradients: optimizer.apply(gradients))
    run.step = lambda gradients: function(
        *[tf.constant(g, "float32") for g in gradients]
    )
    return run


def make_replicas(strategy, optimizer, weights):
    """Replica 0 has only the good part, replica 1 what is left and the bad."""
    run = Run(optimizer, weights, strategy)

    @tf.function
    def step(gradients):
        strategy.run(lambda *gs: optimizer.apply(gs), args=gradients)

    def distribute(gradients):
        good = [
            np.where(np.isfinite(g) & (np.abs(g) < 1e20), g / 4, 1)
            for g in gradients
        ]
        parts = [good, [g - h for g, h in zip(gradients, good)]]
        return tuple(
            strategy.experimental_distribute_values_from_function(
                lambda context, i=i: tf.constant(
                    parts[context.replica_id_in_sync_group][i], "float32"
                )
            )
            for i in range(len(gradients))
        )

    run.step = lambda gradients: step(distribute(gradients))
    return run


def make_run(context, row, **kwargs):
    kwargs = {"skip_nonfinite": True, "weight_decay": 0.25, **kwargs}
    if context != "replicas":
        make = {"eager": make_eager, "function": make_function}[context]
        return make(row.make(**kwargs), make_variables())
    strategy = two_replicas()
    with strategy.scope():
        return make_replicas(strategy, row.make(**kwargs), make_variables())


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_differ(actual, expected):
    assert not all(map(np.array_equal, actual, expected))


def test_every_optimizer_is_here():
    assert {row.cls for row in ROWS} >= {case.cls for case in CASES}


@pytest.mark.parametrize(
    "row, context, jit",
    [
        *((row, "function", True) for row in ROWS),
        *((row, "eager", False) for row in ROWS),
        *((row, "replicas", True) for row in ROWS),
        (ROWS[0], "function", False),
        (ROWS[0], "eager", True),
        (ROWS[0], "replicas", False),
    ],
    ids=lambda value: getattr(value, "id", value),
)
def test_leaves_no_trace(row, context, jit):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.125, 1, 0.5)
    kwargs = {"jit_compile": jit, "use_ema": True, "learning_rate": schedule}
    if context != "replicas":  # There, Keras cannot overwrite.
        kwargs["ema_overwrite_frequency"] = 2
    run = make_run(context, row, **kwargs)
    start = [variable.numpy() for variable in run.variables]
    expected = [run.values()]
    for gradients in GOOD:
        run.step(gradients)
        expected.append(run.values())
        assert_differ(*expected[-2:])
    assert set(run.skipped()) == {0}

    run.put_back(start)
    count = 0
    for i, gradients in enumerate([*GOOD, GOOD[0]]):
        # Before the first step, between two, and more than one in a row.
        for value in BAD_VALUES if i == 1 else BAD_VALUES[:1]:
            run.step(spoiled(gradients, value))
            count += 1
            assert_same(run.values(), expected[i])
            assert run.skipped() == [count] * run.strategy.num_replicas_in_sync
        if i < len(GOOD):
            run.step(gradients)
            assert_same(run.values(), expected[i + 1])
    assert run.optimizer.iterations.numpy() == len(GOOD)
    for replicas in run.values():
        assert_same(replicas[1:], replicas[:-1])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"clipvalue": 0.5},
        {"clipnorm": 0.5},
        {"global_clipnorm": 0.5},
        {"loss_scale_factor": 8.0},
    ],
    ids=str,
)
def test_clipping_hides_nothing(kwargs):
    for value in BAD_VALUES[:3]:
        run = make_run("eager", ROWS[0], jit_compile=False, **kwargs)
        before = run.values()
        run.step(spoiled(GOOD[0], value))
        assert_same(run.values(), before)
        run.step(GOOD[0])
        assert_differ(run.values(), before)
        assert run.skipped() == [1]


@each_jit
@pytest.mark.parametrize("context", ["eager", "function"])
def test_gradient_accumulation(context, jit):
    kwargs = {"jit_compile": jit, "gradient_accumulation_steps": 2}
    run = make_run(context, ROWS[0], **kwargs)
    start = [variable.numpy() for variable in run.variables]
    for gradients in GOOD[0], GOOD[1], GOOD[1], GOOD[2]:
        run.step(gradients)
    expected = run.values()

    run.put_back(start)
    before = run.values()
    bad = spoiled(GOOD[2], np.nan)
    for gradients in bad, GOOD[0]:
        run.step(gradients)
    assert_same(run.values(), before)
    for gradients in GOOD[0], GOOD[1], GOOD[0], bad, GOOD[1], GOOD[2]:
        run.step(gradients)
    assert_same(run.values(), expected)
    assert run.skipped() == [2]
    assert int(run.optimizer.iterations) == 2


def test_average_of_no_steps_is_not_taken():
    run = make_run("eager", ROWS[0], jit_compile=False, use_ema=True)
    before = run.values()
    run.step(spoiled(GOOD[0], np.inf))
    run.optimizer.finalize_variable_values(run.weights)
    assert_same(run.values(), before)
    run.step(GOOD[0])
    run.step(GOOD[1])
    averages = [
        v.numpy() for v in run.optimizer.variables if "_average" in v.name
    ]
    run.optimizer.finalize_variable_values(run.weights)
    assert_same(run.weights, averages)


def make_model():
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="hidden"),
            keras.layers.Dense(1, name="out"),
        ]
    )


def make_data():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(12, 3)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "replicas": {},
}


@pytest.mark.parametrize(
    "row, mode",
    [(ROWS[0], mode) for mode in MODES] + [(row, "graph") for row in ROWS[1:]],
    ids=lambda value: getattr(value, "id", value),
)
def test_fit(row, mode, tmp_path):
    strategy = tf.distribute.get_strategy()
    if mode == "replicas":
        strategy = two_replicas()
    with strategy.scope():
        model = make_model()
        optimizer = row.make(skip_nonfinite=True, weight_decay=0.25)
        model.compile(optimizer, "mse", **MODES[mode])
    run = Run(optimizer, model.trainable_variables, strategy)
    start = [variable.numpy() for variable in run.variables]
    x, y = make_data()

    def fit(x, y):
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
        model.fit(data, shuffle=False, verbose=0)

    good = np.r_[0:4, 8:12]
    fit(x[good], y[good])
    expected = run.values()
    run.put_back(start)
    x[6] = np.inf  # In the second batch, in the part of the second replica.
    fit(x, y)
    assert_same(run.values(), expected)
    assert run.skipped() == [1] * strategy.num_replicas_in_sync

    # The count is saved, and counting goes on.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.skipped_steps) == 1
    assert loaded.optimizer.skip_nonfinite
    loaded.fit(x[4:8], y[4:8], batch_size=4, verbose=0)
    assert int(loaded.optimizer.skipped_steps) == 2
    assert_same(
        [[v.numpy()] for v in loaded.trainable_variables],
        [values[:1] for values in expected[: len(run.weights)]],
    )


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.keras_cls], ids=lambda case: case.id
)
def test_by_default_it_is_as_in_keras(case):
    optimizer = case.make(blocking="coordinate", jit_compile=False)
    assert optimizer.skipped_steps is None
    twin = case.make_keras()
    weights, expected = make_variables(), make_variables()
    for gradients in GOOD[0], spoiled(GOOD[1], np.nan), GOOD[2]:
        gradients = [tf.constant(g, "float32") for g in gradients]
        optimizer.apply(gradients, weights)
        twin.apply(gradients, expected)
    for a, b in zip(weights, expected):
        np.testing.assert_allclose(a, b, 1e-5)
    bad = [int(np.isnan(weight).sum()) for weight in weights]
    assert bad == [0, 1, 0]
    assert int(optimizer.iterations) == 3


def test_a_bad_gradient_spreads_over_its_block_by_default():
    optimizer = kb.BlockAdam(0.01, blocking="layer", jit_compile=False)
    weights = make_variables()
    optimizer.apply(
        [tf.constant(g, "float32") for g in spoiled(GOOD[0], np.nan)], weights
    )
    bad = [bool(np.isnan(weight).all()) for weight in weights]
    assert bad == [True, True, False]
