"""Every format that Keras has saves and loads an optimizer with all its state.

Enough layers for two state variables of a kind that keep small slots together.
"""

import json

import h5py
import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.cases import each_class_with
from helpers.cases import few_classes
from helpers.cases import make_variables
from helpers.saving import checkpoint_of
from helpers.training import train_on_batch

DATA = np.eye(4, dtype="float32"), np.ones((4, 4), "float32")
FULL = {"use_ema": True, "gradient_accumulation_steps": 2}


def make_model(optimizer, seed=0):
    keras.utils.set_random_seed(seed)
    names = ["dense", *(f"dense_{i}" for i in range(10, 26))]
    layers = [keras.layers.Dense(4, name=name) for name in names]
    x = inputs = keras.Input((4,))
    for layer in layers:
        x = layer(x)
    model = keras.Model(inputs, x, name="net")
    # A string as a loss would be another one after loading an `.h5` file.
    loss = keras.losses.MeanSquaredError()
    model.compile(optimizer, loss, run_eagerly=True)
    optimizer.build(model.trainable_variables)
    return model


def make(cls=kb.BlockRMSprop, **kwargs):
    return cls(0.01, name="optimizer", jit_compile=False, **kwargs)


def trained(optimizer):
    model = make_model(optimizer)
    for _ in range(2):
        model.train_on_batch(*DATA)
    return model


def other(model):
    """The same model and optimizer, without its weights and its state."""
    optimizer = model.optimizer
    return make_model(type(optimizer).from_config(optimizer.get_config()), 1)


def whole_model(name):
    def copy(model, folder):
        model.save(folder / name)
        return keras.models.load_model(folder / name)

    return copy


def h5_state(model, folder):
    """What an `.h5` file has of the optimizer; see below."""
    model.save(folder / "model.h5")
    loaded = other(model)
    with h5py.File(folder / "model.h5") as file:
        group = file["optimizer_weights"]
        values = [group[name][()] for name in group.attrs["weight_names"]]
    loaded.optimizer.set_weights(values)
    loaded.set_weights(model.get_weights())
    return loaded


def weights(name, **kwargs):
    def copy(model, folder):
        model.save_weights(folder / name, **kwargs)
        loaded = other(model)
        loaded.load_weights(folder / name)
        return loaded

    return copy


def sharded(model, folder):
    path = folder / "model.weights.json"
    model.save_weights(path, max_shard_size=1e-6)
    files = json.loads(path.read_text())["weight_map"].values()
    assert len(set(map(str, files))) > 1
    if all(isinstance(names, str) for names in files):
        pytest.skip("this Keras loads the first shard of an optimizer alone")
    loaded = other(model)
    loaded.load_weights(path)
    return loaded


def state_tree(model, folder):
    loaded = other(model)
    loaded.set_state_tree(model.get_state_tree(value_format="numpy_array"))
    return loaded


def callback(name):
    def copy(model, folder):
        saves = keras.callbacks.ModelCheckpoint(folder / name)
        model.fit(*DATA, verbose=0, callbacks=[saves])
        return keras.models.load_model(folder / name)

    return copy


def tf_checkpoint(model, folder):
    path = checkpoint_of(model).save(str(folder / "state"))
    loaded = other(model)
    checkpoint_of(loaded).restore(path).assert_consumed()
    return loaded


def orbax(model, folder):
    pytest.importorskip("orbax.checkpoint")
    if not hasattr(keras.callbacks, "OrbaxCheckpoint"):
        pytest.skip("this Keras has no `OrbaxCheckpoint`")
    saves = keras.callbacks.OrbaxCheckpoint(str(folder))
    model.fit(*DATA, verbose=0, callbacks=[saves])
    return keras.models.load_model(str(folder))


FORMATS = {
    "keras": whole_model("model.keras"),
    "h5": h5_state,
    "weights": weights("model.weights.h5"),
    "sharded": sharded,
    "state tree": state_tree,
    "ModelCheckpoint": callback("model.keras"),
    "orbax": orbax,
}


def assert_copies(copy, optimizer, folder):
    model = trained(optimizer)
    names = [variable.name for variable in optimizer.variables]
    assert {"small_momentum_1", "small_velocity_1"} & {*names}
    loaded = copy(model, folder)
    assert_same(*(m.weights + m.optimizer.variables for m in (loaded, model)))
    assert any(np.any(value) for value in to_numpy(optimizer.variables[3:]))
    losses = [train_on_batch(m, *DATA) for m in (model, loaded) * 2]
    assert losses[0] == losses[1] != losses[2] == losses[3]


@pytest.mark.parametrize("name", FORMATS)
def test_saves_and_loads(name, tmp_path):
    assert_copies(FORMATS[name], make(), tmp_path)


@pytest.mark.tensorflow
def test_tf_checkpoint(tmp_path):
    assert_copies(tf_checkpoint, make(), tmp_path)


@few_classes
def test_as_h5(case, tmp_path):
    optimizer = case.make(name="optimizer", jit_compile=False)
    assert_copies(FORMATS["h5"], optimizer, tmp_path)


@pytest.mark.filterwarnings("ignore:The model is loaded without the state")
@pytest.mark.parametrize(
    ("copy", "make_optimizer"),
    [(whole_model, keras.optimizers.Adam), (callback, make)],
)
def test_keras_loads_no_state_from_h5(copy, make_optimizer, tmp_path):
    """It builds the optimizer for a model without variables.

    When this fails for its own Adam, a state can be loaded.
    """
    model = trained(make_optimizer())
    loaded = copy("model.h5")(model, tmp_path)
    assert_same(loaded.weights, model.weights)
    if make_optimizer is not make:
        # Older versions of Keras fail to print the variable.
        with pytest.raises(
            (ValueError, NotImplementedError),
            match=r"Unknown variable|with 0 variables|numpy\(\)",
        ):
            loaded.train_on_batch(*DATA)
        return
    assert not loaded.optimizer.built
    losses = [train_on_batch(loaded, *DATA) for _ in range(3)]
    assert losses[0] > losses[2]


# "layer" asks which layer each variable is of.
@pytest.mark.filterwarnings("ignore:Names and shapes")
@each_class_with("blocking", ["output_unit", "layer"])
def test_paths_are_unique(case, blocking):
    """Also where layers have one path, or paths are one with other slashes."""
    if case.cls is kb.AdaBlock:  # The blocks would be too large.
        blocking = "adablock"
    optimizer = case.make(blocking=blocking, **FULL)
    shapes = {"a/b_kernel": (2, 3), "a_b/kernel": (2, 3)}
    shapes |= {"small/kernel": (70, 70), "out/bias": (3,)}
    variables = [v for _ in range(20) for v in make_variables(shapes)]
    optimizer.build(variables)
    paths = [variable.path for variable in optimizer.variables]
    assert len(set(paths)) == len(paths) > 100


def test_a_name_that_is_taken_gets_a_number():
    optimizer = kb.BlockAdam(name="optimizer")
    names = ["iteration", "a", "a", "a_1", "a"]
    added = [optimizer.add_variable((), name=name).path for name in names]
    assert added == [
        f"optimizer/{name}" for name in ["iteration_1", "a", "a_1", "a_1_1"]
    ] + ["optimizer/a_2"]
