"""Models whose layers have square kernels and names of their own.

Names and shapes alone cannot tell what their axes mean.
"""

import keras
import numpy as np

L = keras.layers
UP, REVERSED, PLAIN = (4, 1, 4), (1, 4), (4, 1)


def up(name="up"):
    return L.Conv1DTranspose(4, 4, padding="same", use_bias=False, name=name)


def reverse(name="reverse"):
    return L.EinsumDense("abc,dc->abd", (None, 4), name=name)


def plain(name="plain"):
    return L.Dense(4, use_bias=False, name=name)


def sequential(built=True):
    inputs = [keras.Input((4, 4))] if built else []
    return keras.Sequential([*inputs, up(), reverse(), plain()])


def functional():
    x = inputs = keras.Input((4, 4))
    for layer in (up(), reverse(), plain()):
        x = layer(x)
    return keras.Model(inputs, x)


def nested():
    inputs = keras.Input((4, 4))
    inner = keras.Sequential([keras.Input((4, 4)), up(), reverse()])
    middle_inputs = keras.Input((4, 4))
    middle = keras.Model(middle_inputs, inner(middle_inputs))
    return keras.Model(inputs, plain()(middle(inputs)))


@keras.saving.register_keras_serializable("tests")
class Block(L.Layer):
    """Layers in a list, in a dict, and in an attribute."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = [up()]
        self.others = {"a": reverse()}
        self.last = plain()

    def build(self, shape):
        for layer in self.sublayers():
            layer.build(shape)

    def call(self, x):
        for layer in self.sublayers():
            x = layer(x)
        return x

    def sublayers(self):
        return [*self.first, self.others["a"], self.last]


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block()

    def build(self, shape):
        self.block.build(shape)

    def call(self, x):
        return self.block(x)


def subclassed(built=True):
    model = Subclassed()
    if built:
        model.build((None, 4, 4))
    return model


MODELS = {
    "sequential": sequential,
    "functional": functional,
    "nested": nested,
    "subclassed": subclassed,
}
X = np.random.default_rng(0).normal(size=(2, 4, 4)).astype("float32")
