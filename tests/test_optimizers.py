"""The named optimizers: each argument, and that they equal Keras's own.

No optimizer is left out of the tables, and no argument out of a config. With
coordinate blocks they are Keras's optimizers, with every base option.
"""

import functools
import inspect
import json

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_close
from helpers.cases import BETAS
from helpers.cases import CASES
from helpers.cases import OPTIMIZERS
from helpers.cases import SCHEMES
from helpers.cases import SHAPES
from helpers.cases import each_class
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import of_classes
from helpers.cases import some_quick
from helpers.training import eager
from helpers.training import graph
from helpers.training import train
from keras_blockwise.blocking import schemes

BACKEND = keras.backend.backend()
STEPS = 20
LEARNING_RATE = 2.0**-5
TOLERANCES = {"float64": 1e-13, "float32": 2e-6}

REDUCTIONS = [case for case in CASES if case.keras_cls]
each_reduction = pytest.mark.parametrize(
    "case", REDUCTIONS, ids=lambda case: case.id
)
# The last row of each class has all of its statistics.
BY_CLASS = list({case.cls: case for case in REDUCTIONS}.values())
each_reduced_class = of_classes(BY_CLASS)


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


def named_results(optimizer, variables, gradients=None, wrap=graph):
    """Weights and state after training, by name."""
    gradients = gradients or make_gradients(STEPS)
    values = train(optimizer, variables, gradients, wrap)
    names = [variable.path for variable in variables]
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    product = getattr(inner, "_u_product", None)  # Of Keras's Nadam.
    for i, variable in enumerate(optimizer.variables):
        if variable is product:
            del values[len(names)]
            continue
        # Our velocity is Adagrad's accumulator.
        name = variable.name.replace("_accumulator", "_velocity")
        names.append(f"{i}/{name}" if name in names else name)
    return dict(zip(names, values, strict=True))


def assert_equal(optimizers, dtype="float64", constraint=None, **kwargs):
    results = []
    for optimizer in optimizers:
        variables = make_variables(dtype=dtype)
        for variable in variables:
            variable.constraint = constraint
        results.append(named_results(optimizer, variables, **kwargs))
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    tolerance = TOLERANCES[dtype]
    inner = getattr(optimizers[1], "inner_optimizer", optimizers[1])
    if isinstance(inner, keras.optimizers.Nadam):
        tolerance = TOLERANCES["float32"]  # Its 0.96 is of float32.
    for name, value in theirs.items():
        scale = max(1.0, np.abs(value).max())
        assert_close([ours[name]], [value], tolerance, tolerance * scale)
    return ours


@each_reduction
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_equals_keras(case, dtype):
    assert_equal(pair(case), dtype)


@some_quick(BY_CLASS)
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
    return named_results(pair(case)[0], make_variables(dtype="float64"))


each_option = pytest.mark.parametrize(
    "options", OPTIONS.values(), ids=OPTIONS.keys()
)


@some_quick([case for case in BY_CLASS if case.cls in (kb.BlockAdam, kb.BAG)])
@each_option
def test_option_equals_keras(case, options):
    with_option = assert_equal(pair(case, **options))
    without = without_options(case.id)
    assert any(
        name not in without or (value != without[name]).any()
        for name, value in with_option.items()
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            OPTIONS[name],
            id=name,
            marks=() if name == "weight_decay" else pytest.mark.slow,
        )
        for name in (
            "weight_decay",
            "ema_overwrite_frequency",
            "gradient_accumulation_and_clipping",
        )
    ],
)
def test_option_compiled_and_eager_equals_keras(options):
    ours, theirs = pair(REDUCTIONS[0], **options)
    ours.jit_compile = True
    assert_equal((ours, theirs), wrap=eager)


@some_quick(BY_CLASS)
def test_exclude_from_weight_decay_equals_keras(case):
    optimizers = pair(case, weight_decay=0.5)
    for optimizer in optimizers:
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    excluded = assert_equal(optimizers)
    decayed, without = (
        named_results(pair(case, **options)[0], make_variables(dtype="float64"))
        for options in ({"weight_decay": 0.5}, {})
    )
    assert (excluded["dense/bias"] == without["dense/bias"]).all()
    assert (excluded["dense/kernel"] == decayed["dense/kernel"]).all()
    assert (decayed["dense/bias"] != without["dense/bias"]).all()


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@some_quick(BY_CLASS)
def test_missing_gradients_equal_keras(case):
    gradients = make_gradients(STEPS)
    for step, given in enumerate(gradients):
        if step % 4:
            given[step % 4 - 1] = None
    assert_equal(pair(case), gradients=gradients)


@each_reduced_class
def test_constraint_equals_keras(case):
    constraint = keras.constraints.MinMaxNorm(0.5, 1.0)
    values = assert_equal(pair(case), constraint=constraint)
    norms = np.linalg.norm(values["dense/kernel"], axis=0)
    assert (norms < 1.0 + 1e-6).all()


@each_reduced_class
@pytest.mark.parametrize("wrap", [eager, graph])
def test_loss_scale_optimizer_equals_keras(case, wrap):
    if case.keras_cls is keras.optimizers.Nadam and BACKEND == "jax":
        # Not among the variables that a stateless step returns.
        pytest.skip("Keras's Nadam loses its `_u_product` within the wrapper")
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


@pytest.mark.filterwarnings("ignore:The output layer is not known")
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
        named_results(optimizer, make_variables(dtype="float64"), signs)
        for optimizer in (optimizer, sgd)
    )
    for path in SHAPES:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-13)


@pytest.mark.parametrize("wrap", [eager, graph])
@pytest.mark.parametrize(
    "momentum, nesterov", [(0.875, True), (0.875, False), (0.0, False)]
)
def test_without_blocks_bagm_is_sgd(momentum, nesterov, wrap):
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": 0.5}
    rate = OPTIONS["schedule"]["learning_rate"]
    optimizer = kb.BAGM(rate, blocking="none", jit_compile=False, **options)
    ours, theirs = (
        named_results(optimizer, make_variables(dtype="float64"), wrap=wrap)
        for optimizer in (optimizer, keras.optimizers.SGD(rate, **options))
    )
    for path in SHAPES:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-15)


# Arguments and configs.

BLOCKING = kb.Blocking("layer", {"a/kernel": (None, 1), ".*/b": "model"})

# One value other than the default for every argument of every optimizer.
NON_DEFAULT = {
    "ns_steps": 3,
    "output_layer": "out",
    "accumulator": "polynomial",
    "amsgrad": True,
    "beta_1": 0.5,
    "beta_2": 0.75,
    "blocking": BLOCKING,
    "bounds": [50.0, 0.25],
    "centered": True,
    "clipnorm": 1.5,
    "clipvalue": 2.5,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 7,
    "epsilon": 0.25,
    "global_clipnorm": 3.5,
    "gradient_accumulation_steps": 4,
    "initial_accumulator_value": 0.5,
    "jit_compile": False,
    "layers_per_step": 2,
    "learning_rate": 0.125,
    "learning_rate_multipliers": {"a/kernel": 0.5, ".*/bias": 0.0},
    "loss_scale_factor": 8.0,
    "momentum": 0.25,
    "momentum_dtype": "bfloat16",
    "name": "renamed",
    "nesterov": False,
    "power": 1.5,
    "reset_bias_correction": False,
    "reset_every": 200,
    "reset_warmup": 20,
    "rho": 0.25,
    "seed": 5,
    "sgd_learning_rate": [0.5, 0.25],
    "skip_nonfinite": True,
    "stochastic_rounding": True,
    "spike_threshold": 25.0,
    "use_ema": True,
    "value": "variable",
    "weight_decay": 0.0625,
}
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.25)


def named_parameters(optimizer_class):
    """Arguments of the constructor, and those of its base classes, Keras's too.

    What a class does not name, `**kwargs` hands on.
    """
    parameters = {}
    for cls in reversed(optimizer_class.__mro__[:-1]):
        if "__init__" in vars(cls):
            parameters |= inspect.signature(cls.__init__).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if name != "self" and parameter.kind not in kinds
    }


ARGUMENTS = [
    pytest.param(cls, name, default, id=f"{cls.__name__}-{name}")
    for cls in OPTIMIZERS
    for name, default in named_parameters(cls).items()
]
ROUND_TRIPS = {
    "from_config": lambda o: type(o).from_config(o.get_config()),
    "json": lambda o: type(o).from_config(
        json.loads(json.dumps(o.get_config()))
    ),
    "saving": lambda o: keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(o)
    ),
    "optimizers": lambda o: keras.optimizers.deserialize(
        keras.optimizers.serialize(o)
    ),
}
each_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS)
each_trip = pytest.mark.parametrize(
    "trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys()
)


def value_of(optimizer, name):
    value = getattr(optimizer, name)
    return float(value) if name == "learning_rate" else value


def test_the_signatures_were_read():
    # Guards the tables: without arguments nothing would be tested.
    names = named_parameters(kb.BAG).keys()
    assert {"epsilon", "blocking", "weight_decay", "use_ema"} <= names
    assert len(OPTIMIZERS) >= 5


@each_optimizer
def test_every_optimizer_has_a_case(cls):
    assert cls in [case.cls for case in CASES]


def test_every_scheme_is_in_the_table():
    assert sorted(SCHEMES) == sorted(schemes.SCHEMES)


@pytest.mark.parametrize(("cls", "name", "default"), ARGUMENTS)
def test_argument_survives_every_round_trip(cls, name, default):
    expected = NON_DEFAULT[name]
    assert expected != default, "the table must have another value"
    optimizer = cls(**{name: expected})
    assert value_of(optimizer, name) == expected
    plain = BLOCKING.get_config() if name == "blocking" else expected
    assert optimizer.get_config()[name] == plain
    for trip in ROUND_TRIPS.values():
        restored = trip(optimizer)
        assert type(restored) is cls
        assert value_of(restored, name) == expected
        assert restored.get_config() == optimizer.get_config()


@each_optimizer
def test_config_has_nothing_but_arguments(cls):
    # Whatever is in a config is given to the constructor.
    assert cls().get_config().keys() <= named_parameters(cls).keys()


@each_trip
@each_optimizer
def test_schedule_survives(cls, trip):
    restored = trip(cls(SCHEDULE))
    config = restored.get_config()["learning_rate"]
    assert config["config"] == SCHEDULE.get_config()
    np.testing.assert_allclose(restored.learning_rate, 0.5)


@each_class
@pytest.mark.parametrize("built", [False, True])
def test_config_is_plain_json(case, built):
    optimizer = case.make(blocking=BLOCKING if not built else "layer")
    if built:
        optimizer.build([keras.Variable(np.ones((2, 3)), name="kernel")])
    config = optimizer.get_config()
    assert json.loads(json.dumps(config)) == config
    assert (config["blocking"]["table"] is not None) == built
    restored = case.cls.from_config(config)
    assert restored.get_config() == config
    assert not restored.built


@each_optimizer
def test_integers_of_numpy_are_plain_in_a_config(cls):
    config = cls().get_config()
    integers = {
        name: np.int64(3)
        for name in inspect.signature(cls.__init__).parameters
        if type(config.get(name)) is int or name in ("layers_per_step", "seed")
    }
    json.dumps(cls(**integers).get_config())


@each_optimizer
def test_from_config_leaves_its_argument_alone(cls):
    config = cls(SCHEDULE, blocking=BLOCKING).get_config()
    before = json.dumps(config)
    cls.from_config(config)
    assert json.dumps(config) == before


@each_optimizer
def test_registered_under_the_name_of_the_package(cls):
    name = f"keras_blockwise>{cls.__name__}"
    assert keras.saving.get_registered_name(cls) == name
    assert keras.saving.get_registered_object(name) is cls
    assert isinstance(keras.optimizers.get(name), cls)
