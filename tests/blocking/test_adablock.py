"""The blocks of AdaBlock's authors, for the layers of Keras."""

import keras
import pytest

import keras_blockwise as kb
from keras_blockwise.blocking.axes import Axes
from keras_blockwise.blocking.schemes import SCHEMES

L = keras.layers
DENSE = Axes(output=(1,), input=(0,), kind="dense")


@pytest.mark.parametrize(
    ("units", "chunk"),
    [(1, 1), (7, 7), (10, 10), (11, 1), (26, 2), (64, 8), (1000, 10), (0, 1)],
)
def test_chunks_of_what_leaves_an_input_unit(units, chunk):
    assert SCHEMES["adablock"]((3, units), DENSE) == (1, chunk)


# Input shape, layer, and the tile of each of its variables.
LAYERS = {
    "dense": ((5,), L.Dense(12), [(1, 6), (1,)]),
    "conv": ((9, 9, 4), L.Conv2D(6, 3), [(3, 3, 1, 1), (1,)]),
    "conv of one": ((9, 9, 4), L.Conv2D(6, 1), [(1, 1, 1, 1), (1,)]),
    "large conv": ((9, 9, 4), L.Conv2D(6, 7), [(1, 1, 1, 1), (1,)]),
    "conv1d": ((9, 4), L.Conv1D(6, 5), [(5, 1, 1), (1,)]),
    "transpose": ((9, 9, 4), L.Conv2DTranspose(6, 3), [(3, 3, 1, 1), (1,)]),
    "depthwise": ((9, 9, 4), L.DepthwiseConv2D(5), [(5, 5, 1, 1), (1,)]),
    "norm": ((12,), L.LayerNormalization(), [(1,), (1,)]),
    "embedding": ((3,), L.Embedding(10, 14), [(1, 7)]),
    "recurrent": ((3, 5), L.GRU(2), [(1, 6), (1, 6), (1, 1)]),
    "einsum": ((3, 4), L.EinsumDense("abc,dc->abd", (None, 8)), [(8, 1)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    shape, layer, tiles = LAYERS[name]
    model = keras.Sequential(
        [keras.Input(shape), type(layer).from_config(layer.get_config())]
    )
    blocking = kb.Blocking.from_model(model, "adablock")
    optimizer = kb.AdaBlock(blocking=blocking)
    optimizer.build(model.trainable_variables)
    assert [p.block_shape for p in optimizer.partitions] == tiles


def test_attention():
    inputs = keras.Input((3, 6))
    outputs = L.MultiHeadAttention(2, 4)(inputs, inputs)
    model = keras.Model(inputs, outputs)
    blocking = kb.Blocking.from_model(model, "adablock")
    optimizer = kb.AdaBlock(blocking=blocking)
    optimizer.build(model.trainable_variables)
    tiles = [p.block_shape for p in optimizer.partitions]
    assert tiles == [(1, 1, 4), (1, 1)] * 3 + [(1, 1, 6), (1,)]


def test_an_unknown_matrix_has_chunks_of_its_last_axis():
    assert SCHEMES["adablock"]((4, 12), Axes()) == (1, 6)
    assert SCHEMES["adablock"]((12,), Axes()) == (1,)
    assert SCHEMES["adablock"]((), Axes()) == ()
