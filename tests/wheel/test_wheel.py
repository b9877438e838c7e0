"""The wheel, where it is installed: `.ci/wheel` runs this, and other tests."""

from importlib import metadata
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.cases import OPTIMIZERS
from helpers.processes import ROOT

SOURCE = ROOT / "keras_blockwise"
INSTALLED = [
    file for file in metadata.files("keras-blockwise") if file.suffix != ".pyc"
]


def test_the_wheel_is_what_is_imported():
    assert not Path(kb.__file__).is_relative_to(ROOT)


def test_the_wheel_has_the_package_and_nothing_else():
    source = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"keras_blockwise/py.typed"} < source
    assert source == {
        file.as_posix()
        for file in INSTALLED
        if not file.parts[0].endswith(".dist-info")
    }


def test_the_wheel_has_the_licence():
    (licence,) = [file for file in INSTALLED if file.name == "LICENSE"]
    assert licence.read_text() == (ROOT / "LICENSE").read_text()


def test_the_version_is_that_of_the_package():
    assert metadata.version("keras-blockwise") == kb.__version__


@pytest.mark.parametrize("name", kb.__all__)
def test_every_public_name_is_there(name):
    assert getattr(kb, name).__module__.startswith("keras_blockwise.")


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
@pytest.mark.filterwarnings("ignore:The output layer is not known")
def test_every_optimizer_trains(cls):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(cls(0.01), "mse", run_eagerly=True)
    before = model.get_weights()
    model.fit(np.ones((4, 3)), np.zeros((4, 2)), verbose=0)
    for old, new in zip(before, model.get_weights()):
        assert np.all(np.isfinite(new)) and np.any(new != old)
