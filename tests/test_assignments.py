"""An argument that is assigned takes effect, or is refused."""

import inspect

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_differ
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.cases import OPTIMIZERS
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.training import built
from helpers.training import train

pytestmark = pytest.mark.filterwarnings("ignore:The output layer is not known")
SHAPES = {"dense/kernel": (4, 3)}
# Another value than the default of every argument.
VALUES = {
    "beta_1": 0.5,
    "beta_2": 0.5,
    "rho": 0.5,
    "momentum": 0.5,
    "epsilon": 0.5,
    "power": 1.0,
    "initial_accumulator_value": 0.5,
    "amsgrad": True,
    "centered": True,
    "nesterov": False,
    "accumulator": "polynomial",
    "blocking": "layer",
    "bounds": [0.5, 0.5],
    "layers_per_step": 1,
    "seed": 5,
    "momentum_dtype": "bfloat16",
    "weight_decay": 0.5,
    "use_ema": True,
    "gradient_accumulation_steps": 2,
    "spike_threshold": 0.5,
    "reset_every": 200,
    "reset_warmup": 50,
    "reset_bias_correction": False,
    "ns_steps": 3,
    "stochastic_rounding": True,
}
ONCE = {
    "skip_nonfinite": True,
    "value": "variable",
    "output_layer": "dense",
    "sgd_learning_rate": 0.5,
}
EVER = {
    "learning_rate": 0.5,
    "clipnorm": 0.125,
    "clipvalue": 0.125,
    "global_clipnorm": 0.125,
    "loss_scale_factor": 4.0,
}
UNUSED = {"jit_compile": False}  # Changes no number.


def arguments_of(cls):
    names = set()
    for base in map(vars, cls.__mro__):
        if "__init__" in base:
            names.update(inspect.signature(base["__init__"]).parameters)
    return names - {"self", "args", "kwargs"}


def given(values):
    return [
        (cls, name, value)
        for cls in OPTIMIZERS
        for name, value in values.items()
        if name in arguments_of(cls)
    ]


def ends_of(optimizer):
    return train(optimizer, make_variables(SHAPES), make_gradients(3, SHAPES))


def test_every_argument_has_a_row():
    rows = {*VALUES, *ONCE, *EVER, *UNUSED}
    # The last has `test_multipliers`.
    others = {
        *("name", "ema_momentum", "ema_overwrite_frequency"),
        "learning_rate_multipliers",
    }
    assert set().union(*map(arguments_of, OPTIMIZERS)) <= rows | others


def assigned_and_passed(cls, name, value):
    assigned, passed = (
        cls(0.1, jit_compile=False),
        cls(0.1, jit_compile=False, **{name: value}),
    )
    setattr(assigned, name, value)
    return assigned, passed


@pytest.mark.parametrize(("cls", "name", "value"), given(VALUES))
def test_before_build_it_is_in_the_config(cls, name, value):
    assigned, passed = assigned_and_passed(cls, name, value)
    configs = [{**o.get_config(), "name": ""} for o in (assigned, passed)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    # One class for each argument.
    {name: (cls, name, value) for cls, name, value in given(VALUES)}.values(),
)
def test_before_build_it_takes_effect(cls, name, value):
    assigned, passed = assigned_and_passed(cls, name, value)
    assert_same(ends_of(assigned), ends_of(passed))


@pytest.mark.parametrize(("cls", "name", "value"), given({**VALUES, **ONCE}))
def test_after_build_it_is_refused(cls, name, value):
    optimizer = built(cls(), make_variables())
    config = optimizer.get_config()
    with pytest.raises(AttributeError, match=f"`{name}` must be given to the "):
        setattr(optimizer, name, value)
    assert optimizer.get_config() == config


@pytest.mark.parametrize(("cls", "name", "value"), given(ONCE))
def test_what_the_constructor_uses_is_refused_at_once(cls, name, value):
    optimizer = cls()
    with pytest.raises(AttributeError, match=f"`{name}` must be given to the "):
        setattr(optimizer, name, value)


@pytest.mark.parametrize(("name", "value"), EVER.items())
def test_what_takes_effect_at_any_time(name, value):
    ends = []
    for assigned in (False, True):
        optimizer = kb.BlockAdam(**({} if assigned else {name: value}))
        optimizer.build(make_variables(SHAPES))
        if assigned:
            setattr(optimizer, name, value)
        ends.append(ends_of(optimizer))
    assert_same(*ends)
    assert_differ(ends[0], ends_of(kb.BlockAdam()))


def test_a_malformed_blocking_is_refused_when_assigned():
    optimizer = kb.BAG()
    with pytest.raises(ValueError, match="Received: 'unit'"):
        optimizer.blocking = "unit"
    assert optimizer.blocking == kb.Blocking()


def test_an_argument_of_a_subclass():
    class Mine(kb.BlockAdam):
        def __init__(self, *args, decay=0.5, **kwargs):
            super().__init__(*args, **kwargs)
            self.decay = decay
            self.note = None

        def rule(self):
            self.beta_1 = self.decay
            return super().rule()

    optimizer = Mine()
    optimizer.decay = 0.25
    optimizer.build(make_variables())
    assert optimizer.beta_1 == 0.25
    with pytest.raises(AttributeError, match="`decay` must be given to the"):
        optimizer.decay = 0.75
    optimizer.note = "not an argument"


def test_a_loss_scale_optimizer_may_wrap_a_built_optimizer():
    inner = built(kb.BAG(0.1, loss_scale_factor=4.0), make_variables())
    wrapper = keras.optimizers.LossScaleOptimizer(inner)
    wrapper.learning_rate = 0.25
    assert inner.loss_scale_factor is None
    assert float(inner.learning_rate) == 0.25


def test_exclusion_from_weight_decay_is_refused_after_build():
    optimizer = kb.BlockAdam(0.1, weight_decay=0.5)
    variables = make_variables()
    optimizer.exclude_from_weight_decay(var_list=variables[:1])
    optimizer.build(variables)
    before = to_numpy(variables)
    with pytest.raises(ValueError, match="must be called before the optimizer"):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.apply(tensors([np.zeros(v.shape) for v in variables]))
    assert_same(variables[:1], before[:1])
    assert_differ(variables[1:2], before[1:2])
