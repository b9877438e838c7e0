"""No optimizer is left out of the tables, and no argument out of a config."""

import inspect
import json

import keras
import numpy as np
import pytest
from cases import CASES

import keras_blockwise as kb

OPTIMIZERS = [
    getattr(kb, name)
    for name in kb.__all__
    if inspect.isclass(getattr(kb, name))
    and issubclass(getattr(kb, name), keras.optimizers.Optimizer)
]
BLOCKING = kb.Blocking("layer", {"a/kernel": (None, 1), ".*/b": "model"})

# One value other than the default for every argument of every optimizer.
NON_DEFAULT = {
    "accumulator": "polynomial",
    "amsgrad": True,
    "beta_1": 0.5,
    "beta_2": 0.75,
    "blocking": BLOCKING,
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
    "learning_rate": 0.125,
    "loss_scale_factor": 8.0,
    "momentum": 0.25,
    "momentum_dtype": "bfloat16",
    "name": "renamed",
    "nesterov": False,
    "power": 1.5,
    "rho": 0.25,
    "skip_nonfinite": True,
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
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
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


@each_case
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
