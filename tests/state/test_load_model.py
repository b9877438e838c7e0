"""A model loads, whatever has become of the state of its optimizer."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_same
from helpers.arrays import refused
from helpers.models import block_adam
from helpers.models import trained_model
from helpers.saving import own_variables
from helpers.training import train_on_batch

DATA = np.ones((2, 4, 3), "float32"), np.ones((2, 4, 4), "float32")
WITHOUT = "The model is loaded without the state of its optimizer.*with a new "
# The square kernels of LoRA.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Names and shapes", "ignore:The saved blocks do not fit"
)


def fine_tuned(make):
    """A layer within a layer has LoRA, which Keras does not save."""
    inputs = keras.Input((4, 3))
    attention = keras.layers.MultiHeadAttention(2, 3)
    x = attention(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    attention._query_dense.enable_lora(2)
    model.compile(make(model), "mse", run_eagerly=True)
    model.train_on_batch(*DATA)
    return model


def with_rules(pattern):
    blocking = kb.Blocking("variable", {pattern: "coordinate"})
    return lambda model: kb.BlockAdam(blocking=blocking, jit_compile=False)


OPTIMIZERS = {
    "Adam": lambda model: keras.optimizers.Adam(),
    "inferred": lambda model: kb.BAGM(jit_compile=False),
    "exact": lambda model: kb.BlockAdam(
        blocking=kb.Blocking.from_model(model, "head"), jit_compile=False
    ),
    "a rule that fits": with_rules(".*bias"),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_that_does_not_fit(kind, tmp_path):
    model = fine_tuned(OPTIMIZERS[kind])
    path = tmp_path / "model.keras"
    model.save(path)
    message = "Skipping variable" if kind == "Adam" else WITHOUT
    with pytest.warns(UserWarning, match=message):
        loaded = keras.models.load_model(path)
    assert loaded.optimizer.built
    assert int(loaded.optimizer.iterations) == 0
    losses = [train_on_batch(loaded, *DATA) for _ in range(3)]
    assert losses[0] > losses[2]


def test_blocks_that_cannot_be_chosen(tmp_path):
    model = fine_tuned(with_rules(".*lora.*"))
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning) as caught:
        loaded = keras.models.load_model(tmp_path / "model.keras")
    messages = [str(warning.message) for warning in caught]
    assert any(
        message.startswith("The model is loaded without the state")
        and "`rules` must match" in message
        for message in messages
    )
    assert not loaded.optimizer.built
    with pytest.raises(ValueError, match="`rules` must match"):
        loaded.train_on_batch(*DATA)  # Not with other blocks, silently.
    loaded.compile(block_adam(), "mse", run_eagerly=True)
    loaded.train_on_batch(*DATA)


def test_state_of_another_optimizer(tmp_path):
    """As in a file whose state somebody has put together."""

    @keras.saving.register_keras_serializable("test_load_model")
    class Mixed(kb.BlockAdam):
        def save_own_variables(self, store):
            other = trained_model(kb.BAGM(jit_compile=False))
            saved = own_variables(other.optimizer)
            for key, value in saved.items():
                store[key] = value

    model = trained_model(Mixed(jit_compile=False), 2)
    model.save(tmp_path / "model.keras")
    message = f"{WITHOUT}Mixed.*Received: the state of BAGM"
    with pytest.warns(UserWarning, match=message):
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(loaded.get_weights(), model.get_weights())
    assert int(loaded.optimizer.iterations) == 0


def test_what_is_loaded_by_itself_is_refused(tmp_path):
    model = trained_model(block_adam(), 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    other = trained_model(kb.BAGM(jit_compile=False), 1)
    other.save_weights(tmp_path / "other.weights.h5")
    message = "must be one of BlockAdam. Received: the state of BAGM"
    with refused(loaded.optimizer.variables, message):
        loaded.load_weights(tmp_path / "other.weights.h5")
    with refused(loaded.optimizer.variables, message):
        loaded.optimizer.load_own_variables(own_variables(other.optimizer))


def test_h5_file(tmp_path):
    """Keras loads no state of it; see `test_formats.py`."""
    model = trained_model(block_adam(), 2)
    model.compile(model.optimizer, keras.losses.MeanSquaredError())
    model.save(tmp_path / "model.h5")
    with pytest.warns(UserWarning, match=f"{WITHOUT}.*save the model as"):
        loaded = keras.models.load_model(tmp_path / "model.h5")
    assert_same(loaded.get_weights(), model.get_weights())
    loaded.train_on_batch(np.eye(3), np.ones((3, 1)))
    with pytest.raises(ValueError, match="must be built before its weights"):
        block_adam().set_weights([])
