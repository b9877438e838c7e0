"""The table of optimizers that drives the common tests.

Every public optimizer has at least one row; `test_optimizers.py` checks that.
"""

import inspect
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from keras_blockwise.state.saving import slot_entries


class Case(NamedTuple):
    """One optimizer with arguments of its own.

    Args:
        cls: Class of the optimizer.
        kwargs: Arguments, all other than their defaults.
        keras_cls: The Keras optimizer that it equals with coordinate blocks.
        keras_kwargs: The arguments of that.
    """

    cls: type[keras.optimizers.Optimizer]
    kwargs: dict[str, Any] = {}
    keras_cls: type[keras.optimizers.Optimizer] | None = None
    keras_kwargs: dict[str, Any] = {}

    def make(self, learning_rate: Any = 0.01, **kwargs: Any) -> Any:
        return self.cls(learning_rate, **{**self.kwargs, **kwargs})

    def make_keras(self, learning_rate: Any = 0.01, **kwargs: Any) -> Any:
        return self.keras_cls(learning_rate, **{**self.keras_kwargs, **kwargs})

    @property
    def id(self) -> str:
        arguments = [f"{key}={value}" for key, value in self.kwargs.items()]
        return "-".join([self.cls.__name__, *arguments])


Adagrad = keras.optimizers.Adagrad
Adam = keras.optimizers.Adam
Nadam = keras.optimizers.Nadam
RMSprop = keras.optimizers.RMSprop
# Betas that float32 can hold: Keras rounds them to it even in float64.
BETAS = {"beta_1": 0.875, "beta_2": 1 - 2.0**-9}
# Output layers, so that there is no warning; some other kernels are hidden.
HIDDEN = {"output_layer": r".*out|.*bias|embedding.*|kernel|dense_[12]\d(/.*)?"}

CASES = [
    Case(kb.BlockAdam, {}, Adam),
    Case(kb.BlockAdam, BETAS, Adam, BETAS),
    Case(
        kb.BlockAdam,
        {"amsgrad": True, **BETAS},
        Adam,
        {"amsgrad": True, **BETAS},
    ),
    Case(kb.AdamMini),
    Case(kb.AdamMini, {"momentum_dtype": "int8"}),
    Case(kb.Adalayer, HIDDEN),
    Case(kb.BlockNadam, BETAS, Nadam, BETAS),
    Case(kb.BAGM, {"momentum": 0.0}),
    Case(kb.BAGM, {"nesterov": False}),
    Case(kb.BAGM, {"accumulator": "polynomial", "power": 2.0}),
    Case(kb.BAGM),
    Case(kb.BlockMuon, {"momentum": 0.0, "ns_steps": 3, **HIDDEN}),
    Case(kb.BlockMuon, HIDDEN),
    Case(kb.BAG, {}, Adagrad),
    Case(
        kb.BAG,
        {"initial_accumulator_value": 0.5, "epsilon": 1e-3},
        Adagrad,
        {"initial_accumulator_value": 0.5, "epsilon": 1e-3},
    ),
    Case(kb.BlockRMSprop, {}, RMSprop),
    Case(kb.BlockRMSprop, {"centered": True}, RMSprop, {"centered": True}),
    Case(
        kb.BlockRMSprop,
        {"momentum": 0.5, "centered": True, "rho": 0.75},
        RMSprop,
        {"momentum": 0.5, "centered": True, "rho": 0.75},
    ),
    Case(kb.BCOS),
    Case(kb.SPAM, {"reset_every": 7, "reset_warmup": 3}),
    # With which small eigenvalues, of few digits in float32, do not count.
    Case(kb.AdaBlock, {"epsilon": 2.0**-6}, Adam, {"epsilon": 2.0**-6}),
    Case(kb.AdaBlock, {"bounds": (8.0, 0.125)}),
]
# The row of each class with the most state.
LAST_OF_CLASS = list({case.cls: case for case in CASES}.values())
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def is_quick(case):
    """Where a case takes seconds: one row of each kind of momentum is quick.

    The others differ from these in what the oracle tests compare.
    """
    return case.cls in (kb.BlockAdam, kb.BAGM) and case in LAST_OF_CLASS


def marks_of(case, is_quick=is_quick):
    return () if is_quick(case) else pytest.mark.slow


def some_quick(cases, is_quick=is_quick):
    """Cases of which the others are slow."""
    return pytest.mark.parametrize(
        "case",
        [pytest.param(c, id=c.id, marks=marks_of(c, is_quick)) for c in cases],
    )


def is_default(case):
    """AdaBlock differs from the others in what its own tests compare."""
    return case.cls is not kb.AdaBlock


def of_classes(cases):
    """One row per class."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(c, id=c.cls.__name__, marks=marks_of(c, is_default))
            for c in cases
        ],
    )


each_class = of_classes(LAST_OF_CLASS)
# For what classes have in common: one with each kind of momentum, one in 8
# bits, and one with matrices.
FEW = [
    case
    for case in LAST_OF_CLASS
    if case.cls in (kb.BlockAdam, kb.AdamMini, kb.BAGM, kb.BlockMuon)
]
few_classes = some_quick(FEW)


def each_class_with(name, values):
    """Every class with one value of a parameter, and two with the others.

    What a value means is the same for all classes.

    Args:
        name: The parameter.
        values: Its values; every class has the first.
    """
    first, *others = values
    quick = list(filter(is_quick, LAST_OF_CLASS))
    rows = [
        pytest.param(
            value,
            case,
            id=f"{case.cls.__name__}-{getattr(value, '__name__', value)}",
            marks=marks_of(case, is_default),
        )
        for value, cases in [
            (first, LAST_OF_CLASS),
            *((v, quick) for v in others),
        ]
        for case in cases
    ]
    return pytest.mark.parametrize(f"{name}, case", rows)


OPTIMIZERS = [
    value
    for value in map(vars(kb).get, kb.__all__)
    if inspect.isclass(value) and issubclass(value, keras.optimizers.Optimizer)
]
SCHEMES = [
    "coordinate",
    "output_unit",
    "input_unit",
    "filter",
    "head",
    "variable",
    "layer",
    "model",
    "adam_mini",
    "adam_mini_short",
    "adablock",
    "adalayer",
    "adalayer_sgd",
    "none",
]

SHAPES = {
    "dense/kernel": (4, 3),
    "dense/bias": (3,),
    "embedding/embeddings": (5, 2),
}


def make_variables(shapes=SHAPES, dtype="float32", seed=0):
    """Variables with the given paths."""
    rng = np.random.default_rng(seed)
    variables = []
    for path, shape in shapes.items():
        layer, _, name = path.rpartition("/")
        with keras.name_scope(layer):
            value = rng.normal(1.0, 0.2, shape)
            variables.append(keras.Variable(value, dtype=dtype, name=name))
    return variables


def make_gradients(steps, shapes=SHAPES, seed=1):
    """Random gradients of each step, no two coordinates on one scale.

    All can be held exactly by bfloat16, so that casting them changes nothing.
    """
    rng = np.random.default_rng(seed)
    scales = [np.exp(rng.normal(0.0, 1.5, s)) for s in shapes.values()]
    return [
        [to_bfloat16(scale * rng.normal(size=scale.shape)) for scale in scales]
        for _ in range(steps)
    ]


def to_bfloat16(x):
    """The nearest numbers that bfloat16 can hold, as float64."""
    return np.float64(np.float64(x).astype("bfloat16"))


def tensors(gradients, dtype="float32"):
    """The gradients of one step as tensors, of one dtype or of one each."""
    dtypes = [dtype] * len(gradients) if isinstance(dtype, str) else dtype
    return [
        g if g is None else keras.ops.convert_to_tensor(g, own)
        for g, own in zip(gradients, dtypes, strict=True)
    ]


def slots_of(optimizer):
    """The values of all slots, by name, whichever variable has them."""
    state = optimizer.block_state
    names = [e.name for e in slot_entries(state.variables, state.slots)]
    return dict(zip(names, state.values(), strict=True))
