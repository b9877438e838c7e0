"""A subclass with variables of its own is saved and loaded like the others."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_same
from helpers.arrays import refused
from helpers.models import state_of
from helpers.models import trained_model
from helpers.saving import FORMATS
from helpers.saving import checkpoint_of
from helpers.saving import load
from helpers.saving import own_variables
from helpers.saving import save
from helpers.tensorflow import marked
from helpers.training import train_on_batch


@keras.saving.register_keras_serializable("test_subclass")
class Counting(kb.BlockAdam):
    """Adds variables before, within and after `build`."""

    size = 3

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.first = self.add_variable((self.size,), name="iteration")

    def build(self, variables):
        if self.built:
            return
        self.second = self.add_variable((), name="average")
        super().build(variables)
        self.third = self.add_variable_from_reference(variables[0], "momentum")

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        for i, variable in enumerate([self.first, self.second, self.third]):
            variable.assign_add(variable * 0 + i + 1)


def make(cls=Counting, **kwargs):
    return cls(0.01, jit_compile=False, **kwargs)


FULL = {"use_ema": True, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("kwargs", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize(
    "format", marked(*([format] for format in [*FORMATS, "whole"]))
)
def test_saves_and_loads(format, kwargs, tmp_path):
    model = trained_model(make(**kwargs), 3)
    save(model, "keras" if format == "whole" else format, tmp_path)
    if format == "whole":
        loaded = keras.models.load_model(tmp_path / "model.keras")
    else:
        loaded = trained_model(make(**kwargs), 1)
        load(loaded, format, tmp_path)
    assert_same(state_of(loaded), state_of(model))
    optimizer = loaded.optimizer
    added = [optimizer.first, optimizer.second, optimizer.third]
    shapes = [(3,), (), (3, 4)]
    expected = [np.full(s, 3.0 * (i + 1), "f4") for i, s in enumerate(shapes)]
    assert_same(added, expected)
    data = np.eye(3), np.ones((3, 1))
    losses = [train_on_batch(m, *data) for m in (model, loaded)]
    assert losses[0] == losses[1]


@pytest.mark.tensorflow
def test_tf_checkpoint_before_build(tmp_path):
    model = trained_model(make(), 3)
    save(model, "checkpoint", tmp_path)
    loaded = keras.models.clone_model(model)
    loaded.compile(optimizer := make(), "mse", run_eagerly=True)
    checkpoint_of(loaded).restore(str(tmp_path / "state-1"))
    optimizer.build(loaded.trainable_variables)
    assert_same(state_of(loaded), state_of(model))


def test_saved_before_the_first_step(tmp_path):
    optimizer = make()
    optimizer.first.assign([1.0, 2.0, 3.0])
    loaded = trained_model(make()).optimizer
    loaded.load_own_variables(own_variables(optimizer))
    assert_same([loaded.first], [optimizer.first])


def test_a_state_that_does_not_fit_is_refused():
    class Larger(Counting):
        size = 4

    Larger.__name__ = "Counting"
    saved = trained_model(make(Larger), 1).optimizer
    loading = trained_model(make()).optimizer
    message = r"'iteration_1' is a variable of a subclass \(3,\). Received"
    with refused(loading.variables, message):
        loading.load_own_variables(own_variables(saved))
