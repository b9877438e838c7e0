"""`skip_nonfinite`: a step with a NaN or an infinity leaves no trace."""

import functools

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_differ
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.cases import CASES
from helpers.cases import HIDDEN
from helpers.cases import OPTIMIZERS
from helpers.cases import Case
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.models import HAS_XLA
from helpers.models import mlp
from helpers.models import normal
from helpers.tensorflow import marked
from helpers.tensorflow import scope_of
from helpers.tensorflow import strategy_of
from helpers.tensorflow import tf
from helpers.training import eager
from helpers.training import graph

if tf is not None:
    from helpers import replicas

# Every class, with all the state it can have; groups and their own blocks.
ROWS = [
    Case(kb.BlockAdam, {"amsgrad": True}),
    Case(kb.AdamMini),
    Case(kb.Adalayer, HIDDEN),
    Case(kb.BlockNadam),
    Case(kb.BAGM, {"accumulator": "polynomial", "blocking": "layer"}),
    Case(kb.BlockMuon, HIDDEN),
    Case(kb.BAG, {"blocking": "model"}),
    Case(kb.BlockRMSprop, {"centered": True, "momentum": 0.5}),
    Case(kb.BCOS),
    Case(kb.SPAM, {"blocking": "output_unit"}),
    Case(kb.AdaBlock, {"bounds": (8.0, 0.125)}),
]
# Those that are compiled, by default and else.
QUICK = [row for row in ROWS if row.cls is kb.BAGM]
SLOW = [row for row in ROWS if row.cls in (kb.AdamMini, kb.BlockMuon)]
COMPILED = ("function", "replicas")
# The last cannot be squared in float32, so the state could not hold it.
BAD_VALUES = [np.nan, np.inf, -np.inf, 1e30]
GOOD = make_gradients(3)

each_jit = pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])


def spoiled(gradients, value):
    """The gradients with one bad entry, in the variable in the middle."""
    gradients = [g.copy() for g in gradients]
    gradients[1][-1] = value
    return gradients


class Run:
    """An optimizer and weights that can be put back to where they were.

    Args:
        optimizer: The optimizer.
        weights: What it is built on.
        strategy: Of `tf.distribute`, if there is one.
    """

    def __init__(self, optimizer, weights, strategy=None):
        self.optimizer = optimizer
        self.weights = weights
        self.strategy = strategy
        with scope_of(strategy):
            optimizer.build(weights)

    @property
    def variables(self):
        return self.weights + self.optimizer.variables

    def on_replicas(self, variable):
        if self.strategy is None:
            return to_numpy([variable])
        return replicas.local_values(self.strategy, variable)

    def values(self):
        """The numbers on every replica, all but the count of skipped steps."""
        return [
            np.stack(self.on_replicas(variable))
            for variable in self.variables
            if variable is not self.optimizer.skipped_steps
        ]

    def skipped(self):
        """The count on each replica."""
        return list(map(int, self.on_replicas(self.optimizer.skipped_steps)))

    def put_back(self, numbers):
        for variable, number in zip(self.variables, numbers):
            variable.assign(number)


def replica_step(strategy, optimizer):
    """Replica 0 has only the good part, replica 1 what is left and the bad."""

    @tf.function
    def step(gradients):
        strategy.run(lambda *gs: optimizer.apply(gs), args=gradients)

    def distributed_step(gradients):
        good = [
            np.where(np.isfinite(g) & (np.abs(g) < 1e20), g / 4, 1)
            for g in gradients
        ]
        parts = [good, [g - h for g, h in zip(gradients, good)]]
        step(tuple(replicas.distribute(strategy, list(map(tensors, parts)))))

    return distributed_step


def make_run(context, row, **kwargs):
    kwargs = {"skip_nonfinite": True, "weight_decay": 0.25, **kwargs}
    strategy = strategy_of(context)
    with scope_of(strategy):
        run = Run(row.make(**kwargs), make_variables(), strategy)
    if strategy:
        run.step = replica_step(strategy, run.optimizer)
    else:
        apply = {"eager": eager, "function": graph}[context](run.optimizer)
        run.step = lambda gradients: apply(tensors(gradients))
    return run


def test_every_optimizer_is_here():
    assert {row.cls for row in ROWS} == set(OPTIMIZERS)


@pytest.mark.parametrize(
    "row, context, jit",
    marked(
        *((row, "eager", False) for row in ROWS),
        *((row, mode, True) for row in QUICK for mode in COMPILED),
        (ROWS[0], "function", False),
        (ROWS[0], "eager", True),
        (ROWS[0], "replicas", False),
    ),
    ids=lambda value: getattr(value, "id", value),
)
def test_leaves_no_trace(row, context, jit):
    check_no_trace(row, context, jit)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, context",
    marked(*((row, mode) for row in SLOW for mode in COMPILED)),
    ids=lambda value: getattr(value, "id", value),
)
def test_leaves_no_trace_compiled(row, context):
    check_no_trace(row, context, True)


def check_no_trace(row, context, jit):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.125, 1, 0.5)
    kwargs = {"jit_compile": jit, "use_ema": True, "learning_rate": schedule}
    if context != "replicas":  # There, Keras cannot overwrite.
        kwargs["ema_overwrite_frequency"] = 2
    run = make_run(context, row, **kwargs)
    start = to_numpy(run.variables)
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
            assert set(run.skipped()) == {count}
        if i < len(GOOD):
            run.step(gradients)
            assert_same(run.values(), expected[i + 1])
    assert run.optimizer.iterations.numpy() == len(GOOD)
    for values in run.values():
        assert len(values) == 1 + (context == "replicas")
        assert_same(values, [values[0]] * len(values))


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
    start = to_numpy(run.variables)
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
    averages = to_numpy(
        v for v in run.optimizer.variables if "_average" in v.name
    )
    run.optimizer.finalize_variable_values(run.weights)
    assert_same(run.weights, averages)


MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": HAS_XLA},
    "eager": {"run_eagerly": True},
    "replicas": {},
}


@pytest.mark.parametrize(
    "row, mode",
    marked(
        *((ROWS[0], mode) for mode in MODES),
        *((row, "graph") for row in ROWS if row.cls in (kb.BAGM, kb.BlockMuon)),
    ),
    ids=lambda value: getattr(value, "id", value),
)
def test_fit(row, mode, tmp_path):
    strategy = strategy_of(mode)
    with scope_of(strategy):
        model = mlp()
        optimizer = row.make(skip_nonfinite=True, weight_decay=0.25)
        model.compile(optimizer, "mse", **MODES[mode])
    run = Run(optimizer, model.trainable_variables, strategy)
    start = to_numpy(run.variables)
    (x,) = normal((12, 3))
    y = x.sum(axis=1, keepdims=True)
    fit = functools.partial(model.fit, batch_size=4, shuffle=False, verbose=0)
    good = np.r_[0:4, 8:12]
    fit(x[good], y[good])
    expected = run.values()
    run.put_back(start)
    x[6] = np.inf  # In the second batch, in the part of the second replica.
    fit(x, y)
    assert_same(run.values(), expected)
    assert set(run.skipped()) == {1}

    # The count is saved, and counting goes on.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.skipped_steps) == 1
    assert loaded.optimizer.skip_nonfinite
    loaded.fit(x[4:8], y[4:8], batch_size=4, verbose=0)
    assert int(loaded.optimizer.skipped_steps) == 2
    assert_same(
        loaded.trainable_variables,
        [values[0] for values in expected[: len(run.weights)]],
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
        optimizer.apply(tensors(gradients), weights)
        twin.apply(tensors(gradients), expected)
    for a, b in zip(weights, expected):
        np.testing.assert_allclose(a, b, 1e-5)
    bad = [int(np.isnan(weight).sum()) for weight in weights]
    assert bad == [0, 1, 0]
    assert int(optimizer.iterations) == 3


def test_a_bad_gradient_spreads_over_its_block_by_default():
    optimizer = kb.BlockAdam(0.01, blocking="layer", jit_compile=False)
    weights = make_variables()
    optimizer.apply(tensors(spoiled(GOOD[0], np.nan)), weights)
    bad = [bool(np.isnan(weight).all()) for weight in weights]
    assert bad == [True, True, False]
