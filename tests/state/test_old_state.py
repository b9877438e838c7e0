"""States saved by an earlier version load, and training goes on with them."""

import json
import runpy
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_blockwise as kb

DATA = Path(__file__).parents[1] / "data"
make = runpy.run_path(str(DATA / "make.py"))
EXPECTED = json.loads((DATA / "expected.json").read_text())


def load(name, format):
    if format == "keras":
        return keras.models.load_model(DATA / f"{name}.keras")
    model = make["make_model"](name)
    for variable in model.variables:
        variable.assign(variable + 1.0)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(DATA / f"{name}.weights.h5")
    return model


@pytest.mark.parametrize(
    "name, format",
    [(name, "keras") for name in EXPECTED]
    + [(name, "weights") for name in make["WEIGHTS"]],
)
def test_loads_and_goes_on(name, format):
    model = load(name, format)
    expected = EXPECTED[name]
    # The names, the order and the values, exactly.
    # Those of Keras's counters are int32 with some backends.
    integer = model.optimizer.variables[0].dtype
    state = [
        [path, integer if dtype == "int64" else dtype, value]
        for path, dtype, value in expected["state"]
    ]
    assert make["describe"](model) == state
    losses = make["train"](model, 4)
    np.testing.assert_allclose(losses, expected["losses"], 1e-5)
    assert len(set(losses)) > 1


@pytest.mark.parametrize("name", EXPECTED)
def test_oldest_keras_knows_all_arguments(name):
    with zipfile.ZipFile(DATA / f"{name}.keras") as file:
        text = file.read("config.json")
    assert make["config_for_all"](text) == json.loads(text)


def test_every_optimizer_is_here():
    optimizers = {
        value
        for value in map(vars(kb).get, kb.__all__)
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
    }
    assert {type(o()) for o in make["OPTIMIZERS"].values()} == optimizers
    assert make["OPTIMIZERS"].keys() == EXPECTED.keys()


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 200_000
