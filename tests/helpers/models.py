"""Small models, their data, and optimizers with the blocks of a model."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb

# Whether `jit_compile=True` of a model is XLA, or PyTorch's slow compiler.
HAS_XLA = keras.backend.backend() != "torch"


def mlp(
    inputs=3,
    hidden=4,
    outputs=1,
    *,
    names=("hidden", "out"),
    activation="tanh",
    name=None,
    **kwargs,
):
    """Two layers in a row.

    Args:
        inputs: How many numbers it takes.
        hidden: Units of the first layer.
        outputs: Units of the second.
        names: Of the layers; `None` for Keras's own.
        activation: Of the first layer.
        name: Of the model.
        **kwargs: Arguments of both layers.
    """
    first, second = names
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(
                hidden, activation=activation, name=first, **kwargs
            ),
            keras.layers.Dense(outputs, name=second, **kwargs),
        ],
        name=name,
    )


def normal(*shapes, seed=3):
    """Random arrays."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def product_data(size, seed=5):
    """Inputs for `mlp`, and what no linear model can learn of them."""
    (x,) = normal((size, 3), seed=seed)
    return x, x[:, :1] * x[:, 1:2]


def state_of(model):
    """All variables of a model and its optimizer."""
    return [*model.variables, *model.optimizer.variables]


def block_adam(blocking="output_unit", learning_rate=0.01, **kwargs):
    return kb.BlockAdam(
        learning_rate, blocking=blocking, jit_compile=False, **kwargs
    )


def trained_model(optimizer, steps=0):
    model = mlp()
    model.compile(optimizer, "mse", run_eagerly=True)
    optimizer.build(model.trainable_variables)
    for _ in range(steps):
        model.train_on_batch(np.eye(3), np.ones((3, 1)))
    return model


def optimizer_for(
    model, scheme="output_unit", rules=None, cls=kb.BlockAdam, **kwargs
):
    """With the blocks that the layers of a model have."""
    blocking = kb.Blocking.from_model(model, scheme, rules)
    # Eager code and plain graphs are faster than what XLA has to compile.
    return cls(blocking=blocking, jit_compile=False, **kwargs)


def all_subclasses(cls):
    for child in cls.__subclasses__():
        yield child
        yield from all_subclasses(child)


class Subclassed(keras.Model):
    """Of two layers, whose order only code knows."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(4, name="a")
        self.second = keras.layers.Dense(3, name="b")

    def call(self, x):
        return self.second(self.first(x))


def subclassed():
    model = Subclassed()
    model(keras.ops.ones((2, 5)))
    return model


needs_reversible_embedding = pytest.mark.skipif(
    not hasattr(keras.layers, "ReversibleEmbedding"),
    reason="this Keras has no `ReversibleEmbedding`",
)
