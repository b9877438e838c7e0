"""Small tasks with real data that a package carries, for `quality`."""

from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

import keras
import numpy as np
from keras import layers

CONTEXT = 64
LOGITS = "logits"

# Inputs and labels.
Part = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Data:
    """What a model learns from, chooses a learning rate by, and is judged by.

    Args:
        classes: How many labels there are.
        draw: Training examples in the order of training, given a generator
            of random numbers and how many there have to be.
        validation: The examples that choose.
        test: The examples that judge.
    """

    classes: int
    draw: Callable[[np.random.Generator, int], Part]
    validation: Part
    test: Part


@dataclass(frozen=True)
class Task:
    """A model, its data and how long it is trained.

    Args:
        title: What the table and the chart call it.
        load: Makes the data.
        make_model: Makes a model for so many classes that ends in a layer
            `LOGITS`.
        steps: How many batches it is trained on.
        batch: Examples in each.
        accuracy: Whether the figure is the accuracy in percent; otherwise it
            is the cross-entropy in nats, which has to be small.
    """

    title: str
    load: Callable[[], Data]
    make_model: Callable[[int], keras.Model]
    steps: int
    batch: int
    accuracy: bool = True

    @property
    def figure(self) -> str:
        if self.accuracy:
            return "test accuracy in percent, more is better"
        return "test nats per character, less is better"


def classifier_data(train: Part, validation: Part, test: Part) -> Data:
    """Epochs of shuffled examples, one after the other."""
    x, y = train

    def draw(rng: np.random.Generator, count: int) -> Part:
        epochs = -(-count // len(x))
        order = np.concatenate([rng.permutation(len(x)) for _ in range(epochs)])
        return x[order[:count]], y[order[:count]]

    return Data(10, draw, validation, test)


def load_text() -> Data:
    """Python's own documentation as characters."""
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet, characters = np.unique(list(text), return_inverse=True)
    characters = characters.astype("int32")
    ends = (np.array([0.9, 0.95]) * len(characters)).astype(int)
    train, validation, test = np.split(characters, ends)

    def windows(part: np.ndarray, starts: np.ndarray) -> Part:
        rows = part[starts[:, None] + np.arange(CONTEXT + 1)]
        return rows[:, :-1], rows[:, 1:]

    def draw(rng: np.random.Generator, count: int) -> Part:
        return windows(train, rng.integers(len(train) - CONTEXT, size=count))

    def whole(part: np.ndarray) -> Part:
        return windows(part, np.arange(0, len(part) - CONTEXT, CONTEXT))

    return Data(len(alphabet), draw, whole(validation), whole(test))


def make_transformer(characters: int) -> keras.Model:
    width, heads = 64, 4
    inputs = keras.Input((CONTEXT,), dtype="int32")
    positions = keras.ops.cumsum(keras.ops.ones_like(inputs), axis=1) - 1
    x = layers.Embedding(characters, width)(inputs)
    x = x + layers.Embedding(CONTEXT, width)(positions)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(
            y, y, use_causal_mask=True
        )
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * width, activation="gelu")(y)
        x = x + layers.Dense(width)(y)
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(characters, name=LOGITS)(x))


def load_digits() -> Data:
    """The 1797 digits of scikit-learn, 8 by 8."""
    from sklearn import datasets

    x, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype("float32"), y[order].astype("int32")
    parts = list(zip(np.split(x, (500, 800)), np.split(y, (500, 800))))
    return classifier_data(parts[2], parts[1], parts[0])


def make_perceptron(classes: int) -> keras.Model:
    model = keras.Sequential([keras.Input((64,))])
    for _ in range(2):
        model.add(layers.Dense(256, use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.ReLU())
    model.add(layers.Dense(classes, name=LOGITS))
    return model


def load_mnist1d() -> Data:
    """Digits as noisy curves of 40 points, which the package makes anew."""
    from mnist1d import data

    made = data.make_dataset()

    def part(x: str, y: str, first: int, end: int) -> Part:
        return (
            made[x][first:end, :, None].astype("float32"),
            made[y][first:end].astype("int32"),
        )

    return classifier_data(
        part("x", "y", 0, 3600),
        part("x", "y", 3600, 4000),
        part("x_test", "y_test", 0, 1000),
    )


def make_convolutions(classes: int) -> keras.Model:
    """The convolutional network of the data's authors."""
    model = keras.Sequential([keras.Input((40, 1))])
    for size in (5, 3, 3):
        model.add(layers.ZeroPadding1D(1))
        model.add(layers.Conv1D(25, size, strides=2, activation="relu"))
    model.add(layers.Flatten())
    model.add(layers.Dense(classes, name=LOGITS))
    return model


TASKS = {
    "text": Task(
        "characters of Python's documentation",
        load_text,
        make_transformer,
        steps=540,
        batch=32,
        accuracy=False,
    ),
    "mnist1d": Task(
        "MNIST-1D", load_mnist1d, make_convolutions, steps=20 * 72, batch=50
    ),
    "digits": Task("digits", load_digits, make_perceptron, 30 * 31, batch=32),
}
