"""Variables without an entry, alone or next to others."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_near
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.cases import SCHEMES
from helpers.cases import each_class
from helpers.cases import each_class_with
from helpers.saving import own_variables
from helpers.training import built
from helpers.training import eager
from helpers.training import graph
from helpers.training import train

EMPTY = {
    "dense/kernel": (0, 4),
    "dense/bias": (0,),
    "dense_1/kernel": (3, 0),
    "embedding/embeddings": (0, 2),
    "conv/kernel": (3, 3, 0, 2),
}
FULL = {"dense_2/kernel": (4, 3), "dense_2/bias": (3,), "dense_1/bias": (5,)}
MIXED = {**EMPTY, **FULL}
# So many that small slots are kept together, empty ones between them.
MANY = {f"d{i}/bias": (0,) if i % 3 == 1 else (2 + i,) for i in range(20)}
pytestmark = pytest.mark.filterwarnings("ignore:Names and shapes")


def numbers(path, shape, step=0):
    return np.random.default_rng([*path.encode(), step]).normal(size=shape)


def variables_of(shapes):
    variables = []
    for path, shape in shapes.items():
        layer, _, name = path.rpartition("/")
        with keras.name_scope(layer):
            variables.append(keras.Variable(numbers(path, shape), name=name))
    return variables


def trained(optimizer, shapes, wrap=eager):
    """The variables that have an entry, after some steps."""
    variables = variables_of(shapes)
    gradients = [
        [numbers(path, shape, step) for path, shape in shapes.items()]
        for step in (1, 2)
    ]
    train(optimizer, variables, gradients, wrap)
    return to_numpy([v for v in variables if 0 not in v.shape])


@pytest.mark.filterwarnings("ignore:The output layer is not known")
@pytest.mark.parametrize(
    ("scheme", "jit_compile"),
    [*((scheme, False) for scheme in SCHEMES), ("layer", True)],
)
def test_schemes(scheme, jit_compile):
    ends = [
        trained(
            kb.BlockAdam(0.1, blocking=scheme, jit_compile=jit_compile), shapes
        )
        for shapes in (MIXED, FULL)
    ]
    assert_near(*ends)


@each_class_with("wrap", [eager, graph])
def test_optimizers(case, wrap):
    options = {"weight_decay": 0.1, "clipnorm": 1.0}
    ends = [
        trained(case.make(0.1, **options), shapes, wrap)
        for shapes in (MIXED, FULL)
    ]
    assert_near(*ends)


def test_state_that_is_kept_together():
    full = {path: shape for path, shape in MANY.items() if 0 not in shape}
    assert_near(*(trained(kb.BlockAdam(0.1), given) for given in (MANY, full)))


@pytest.mark.parametrize("skip_nonfinite", [True, False])
@pytest.mark.parametrize("shapes", [EMPTY, {"dense/bias": (0,)}], ids=len)
def test_nothing_else(shapes, skip_nonfinite):
    optimizer = kb.BAGM(0.1, blocking="layer", skip_nonfinite=skip_nonfinite)
    assert trained(optimizer, shapes) == []
    assert int(optimizer.iterations) == 2


@each_class
def test_state_is_saved_and_converted(case):
    optimizer, restored = case.make(), case.make()
    trained(optimizer, MIXED)
    restored.build(variables_of(MIXED))
    restored.load_own_variables(own_variables(optimizer))
    assert_same(restored.variables, optimizer.variables)
    # Matrices are converted to those of the same blocks alone.
    blocking = "adablock" if case.cls is kb.AdaBlock else "variable"
    target = built(case.make(blocking=blocking), variables_of(MIXED))
    kb.convert_state(optimizer, target)
    assert np.all([np.isfinite(v).all() for v in to_numpy(target.variables)])
    assert len(kb.summary(restored).rows) == len(MIXED)
