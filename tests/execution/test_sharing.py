import gc
import weakref

import pytest
import tensorflow as tf

import keras_blockwise as kb
from helpers.arrays import assert_near
from helpers.cases import SHAPES
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.programs import compiled_functions
from keras_blockwise.execution import sharing

pytestmark = pytest.mark.tensorflow
GRADIENTS = tensors(make_gradients(1)[0])


@pytest.fixture(autouse=True)
def no_functions(monkeypatch):
    monkeypatch.setattr(sharing, "IN_USE", weakref.WeakValueDictionary())
    monkeypatch.setattr(sharing, "LAST", type(sharing.LAST)(maxlen=2))


def stepped(seed=0, shapes=SHAPES, cls=kb.BAGM, learning_rate=0.1, **kwargs):
    variables = make_variables(shapes, seed=seed)
    optimizer = cls(learning_rate, jit_compile=True, **kwargs)
    gradients = tensors(make_gradients(1, shapes)[0])
    optimizer.apply(gradients, variables)
    return optimizer, variables


def function_of(optimizer):
    (function,) = compiled_functions(optimizer)
    return function


def test_equal_optimizers_share_a_function():
    one, _ = stepped()
    two, variables = stepped(seed=3, learning_rate=0.3)
    assert function_of(two) is function_of(one)
    own = make_variables(seed=3)
    kb.BAGM(0.3, jit_compile=False).apply(GRADIENTS, own)
    assert_near(variables, own, 1e-6)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"momentum": 0.8},
        {"weight_decay": 0.1},
        {"blocking": "layer"},
        {"cls": kb.BlockAdam},
        {"skip_nonfinite": True},
        {"momentum_dtype": "bfloat16"},
        {"shapes": {**SHAPES, "dense/kernel": (3, 4)}},
    ],
    ids=str,
)
def test_others_do_not(kwargs):
    (one, _), (two, _) = stepped(), stepped(**kwargs)
    assert function_of(two) is not function_of(one)


def test_a_function_holds_no_variable_and_no_optimizer():
    one, variables = stepped()
    two, _ = stepped()
    owned = [weakref.ref(x) for x in (one, variables[0].value)]
    del one, variables
    gc.collect()
    assert [ref() for ref in owned] == [None, None]
    two.apply(GRADIENTS)


def test_functions_that_nobody_uses_are_freed():
    optimizers = [stepped(momentum=i / 8)[0] for i in range(1, 5)]
    assert len(sharing.IN_USE) == 4
    del optimizers
    gc.collect()
    assert len(sharing.IN_USE) == 2


def test_graphs_that_differ_in_the_names_of_their_functions_are_equal():
    def graph(name):
        def body(i):
            return i + 1

        body.__name__ = name

        @tf.function(autograph=False)
        def loop():
            return tf.while_loop(lambda i: i < 3, body, [0])

        return sharing.graph_of(loop.get_concrete_function())

    assert graph("one") == graph("two")
    assert "While" in graph("one")
