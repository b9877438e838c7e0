"""Coordinate blocks are Keras's own optimizers, with every base option."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import BETAS
from cases import CASES
from cases import SCHEMES
from cases import SHAPES
from cases import make_gradients
from cases import make_variables
from cases import tensors

import keras_blockwise as kb

STEPS = 20
LEARNING_RATE = 2.0**-5
TOLERANCES = {"float64": 1e-13, "float32": 2e-6}

REDUCTIONS = [case for case in CASES if case.keras_cls]
by_case = pytest.mark.parametrize("case", REDUCTIONS, ids=lambda case: case.id)
# The last row of each class has all of its statistics.
by_class = pytest.mark.parametrize(
    "case",
    {case.cls: case for case in REDUCTIONS}.values(),
    ids=lambda case: case.cls.__name__,
)


def pair(case, learning_rate=LEARNING_RATE, **kwargs):
    """An optimizer and the one of Keras that it should equal."""
    # Keras rounds the betas to float32 even in float64.
    if case.keras_cls is keras.optimizers.Adam:
        kwargs = {**kwargs, **BETAS}
    return (
        case.make(
            learning_rate, blocking="coordinate", jit_compile=False, **kwargs
        ),
        case.make_keras(learning_rate, **kwargs),
    )


def graph(apply):
    """Far faster than eager, for both optimizers."""
    return tf.function(apply, autograph=False)


def eager(apply):
    return apply


def train(optimizer, variables, gradients=None, wrap=graph):
    """Weights and state after training, by name."""
    optimizer.build(variables)
    apply = wrap(optimizer.apply)
    for given in gradients or make_gradients(STEPS):
        apply(tensors(given, variables[0].dtype))
    values = {variable.path: variable for variable in variables}
    for i, variable in enumerate(optimizer.variables):
        # Our velocity is Adagrad's accumulator.
        name = variable.name.replace("_accumulator", "_velocity")
        values[f"{i}/{name}" if name in values else name] = variable
    return {
        name: np.float64(keras.ops.convert_to_numpy(value))
        for name, value in values.items()
    }


def assert_equal(optimizers, dtype="float64", constraint=None, **kwargs):
    results = []
    for optimizer in optimizers:
        variables = make_variables(dtype=dtype)
        for variable in variables:
            variable.constraint = constraint
        results.append(train(optimizer, variables, **kwargs))
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    tolerance = TOLERANCES[dtype]
    for name, value in ours.items():
        scale = max(1.0, np.abs(theirs[name]).max())
        np.testing.assert_allclose(
            value, theirs[name], tolerance, tolerance * scale, err_msg=name
        )
    return ours


@by_case
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_equals_keras(case, dtype):
    assert_equal(pair(case), dtype)


@by_class
def test_compiled_equals_keras(case):
    ours, theirs = pair(case)
    ours.jit_compile = True
    assert_equal((ours, theirs), "float32", wrap=eager)


@pytest.mark.parametrize("name", ["beta_1", "beta_2"])
def test_default_betas_equal_those_of_keras(name):
    case = next(case for case in CASES if case.cls is kb.BlockAdam)
    assert getattr(case.make(), name) == getattr(case.make_keras(), name)
    assert case.kwargs == {}
    optimizers = (
        case.make(blocking="coordinate", jit_compile=False),
        case.make_keras(),
    )
    assert_equal(optimizers, "float32")


# Of these, none leaves the weights as they are without it.
OPTIONS = {
    "weight_decay": {"weight_decay": 0.5},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.25},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "use_ema": {"use_ema": True, "ema_momentum": 0.75},
    "ema_overwrite_frequency": {
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 3,
    },
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3},
    "gradient_accumulation_and_clipping": {
        "gradient_accumulation_steps": 2,
        "global_clipnorm": 0.5,
        "weight_decay": 0.5,
    },
    "loss_scale_factor": {"loss_scale_factor": 64.0},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.PiecewiseConstantDecay(
            [4, 9], [0.125, 0.5, 0.0625]
        )
    },
    "callable": {"learning_rate": lambda: 0.125},
}


@functools.cache
def without_options(case_id):
    (case,) = [case for case in REDUCTIONS if case.id == case_id]
    return train(pair(case)[0], make_variables(dtype="float64"))


by_option = pytest.mark.parametrize(
    "options", OPTIONS.values(), ids=OPTIONS.keys()
)


@by_class
@by_option
def test_option_equals_keras(case, options):
    with_option = assert_equal(pair(case, **options))
    without = without_options(case.id)
    assert any(
        name not in without or (value != without[name]).any()
        for name, value in with_option.items()
    )


@by_option
def test_option_compiled_and_eager_equals_keras(options):
    ours, theirs = pair(REDUCTIONS[0], **options)
    ours.jit_compile = True
    assert_equal((ours, theirs), wrap=eager)


@by_class
def test_exclude_from_weight_decay_equals_keras(case):
    optimizers = pair(case, weight_decay=0.5)
    for optimizer in optimizers:
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    excluded = assert_equal(optimizers)
    decayed, without = (
        train(pair(case, **options)[0], make_variables(dtype="float64"))
        for options in ({"weight_decay": 0.5}, {})
    )
    assert (excluded["dense/bias"] == without["dense/bias"]).all()
    assert (excluded["dense/kernel"] == decayed["dense/kernel"]).all()
    assert (decayed["dense/bias"] != without["dense/bias"]).all()


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@by_class
def test_missing_gradients_equal_keras(case):
    gradients = make_gradients(STEPS)
    for step, given in enumerate(gradients):
        if step % 4:
            given[step % 4 - 1] = None
    assert_equal(pair(case), gradients=gradients)


@by_class
def test_constraint_equals_keras(case):
    constraint = keras.constraints.MinMaxNorm(0.5, 1.0)
    values = assert_equal(pair(case), constraint=constraint)
    norms = np.linalg.norm(values["dense/kernel"], axis=0)
    assert (norms < 1.0 + 1e-6).all()


@by_class
@pytest.mark.parametrize("wrap", [eager, graph])
def test_loss_scale_optimizer_equals_keras(case, wrap):
    gradients = make_gradients(STEPS)
    gradients[5][1] = gradients[5][1] + np.inf  # This step is left out.
    assert_equal(
        [
            keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=8.0, dynamic_growth_steps=4
            )
            for optimizer in pair(case)
        ],
        gradients=gradients,
        wrap=wrap,
    )


def signs(steps=STEPS):
    return [[np.sign(g) for g in given] for given in make_gradients(steps)]


@pytest.mark.parametrize(
    "momentum, nesterov, accumulator, scheme",
    [(0.875, True, "exponential", scheme) for scheme in SCHEMES]
    + [
        (0.875, True, "polynomial", "output_unit"),
        (0.875, False, "exponential", "output_unit"),
        (0.875, False, "polynomial", "layer"),
        (0.0, False, "exponential", "output_unit"),
    ],
)
def test_bagm_of_signs_is_sgd(momentum, nesterov, accumulator, scheme):
    """Every block has a mean square of 1, so that nothing is scaled."""
    optimizer = kb.BAGM(
        LEARNING_RATE,
        momentum=momentum,
        nesterov=nesterov,
        accumulator=accumulator,
        epsilon=0.0,
        blocking=scheme,
        jit_compile=False,
    )
    sgd = keras.optimizers.SGD(
        LEARNING_RATE, momentum=momentum, nesterov=nesterov
    )
    signs = [[np.sign(g) for g in given] for given in make_gradients(STEPS)]
    ours, theirs = (
        train(optimizer, make_variables(dtype="float64"), signs)
        for optimizer in (optimizer, sgd)
    )
    for path in SHAPES:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-13)
