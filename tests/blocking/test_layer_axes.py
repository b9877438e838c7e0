"""What the axes of every weight of every Keras layer mean, as a table.

A row for each configuration of each class, written from the documentation of
the layers. `test_gradient_support.py` asks the layers themselves.
"""

import functools
import inspect
import re
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import pytest

from helpers.models import all_subclasses
from keras_blockwise.blocking.axes import Axes
from keras_blockwise.blocking.axes import Weight
from keras_blockwise.blocking.layer_axes import LAYER_AXES
from keras_blockwise.blocking.layer_axes import meanings_in

L = keras.layers
# Not public, but in a public application.
LayerScale = inspect.getmodule(keras.applications.ConvNeXtTiny).LayerScale


def w(shape, kind, output=(), input=(), spatial=(), head=()):
    """Expected shape and axes of a weight."""
    return shape, Axes(output, input, spatial, head, kind)


def each(shape, kind="bias"):
    """Expected of a weight that has one entry per unit."""
    return w(shape, kind, output=tuple(range(len(shape))))


def dense(*shape):
    return w(shape, "dense", output=(1,), input=(0,))


def conv(*shape, groups=1, kind="conv", gates=1):
    window = tuple(range(len(shape) - 2))
    last = len(shape) - 1
    axes = Axes((last,), (last - 1,), window, (), kind, groups, gates)
    return shape, axes


def transposed(*shape):
    window = tuple(range(len(shape) - 2))
    last = len(shape) - 1
    return w(shape, "conv", (last - 1,), (last,), window)


def depthwise(*shape):
    window = tuple(range(len(shape) - 2))
    last = len(shape) - 1
    return w(shape, "conv", (last - 1, last), (last - 1,), window)


def recurrent(*shape, gates=1):
    return conv(*shape, kind="recurrent", gates=gates)


def rows_of(*shape):
    """Embeddings: a row is a unit, as it is where they make the logits."""
    return w(shape, "embedding", output=(0,), input=(1,))


def heads(shape, kind):
    """A projection to heads: `(in, heads, head_dim)`."""
    return w(shape, kind, output=(1, 2), input=(0,), head=(1,))


def lora(layer, *shapes):
    layer.build(*shapes)
    layer.enable_lora(2)
    return layer


def quantized(layer, mode, *shapes):
    layer.build(*shapes)
    layer.quantize(mode)
    layer.enable_lora(2)
    return layer


def lora_attention():
    layer = L.MultiHeadAttention(2, 3, value_dim=5)
    layer.build((2, 7, 4), (2, 7, 4))
    for child in layer._flatten_layers():
        if isinstance(child, L.EinsumDense):
            child.enable_lora(2)
    return layer


def pipeline():
    layer = L.Pipeline([L.Dense(3, name="d")], name="p")
    layer(np.ones((2, 4)))  # It has no `build` of its own.
    return layer


def einsum(equation, output_shape, bias_axes=None):
    return L.EinsumDense(equation, output_shape, bias_axes=bias_axes)


def lstm_weights(prefix, inputs, units):
    return {
        f"{prefix}/kernel": recurrent(inputs, 4 * units, gates=4),
        f"{prefix}/recurrent_kernel": recurrent(units, 4 * units, gates=4),
        f"{prefix}/bias": each((4 * units,)),
    }


class Row(NamedTuple):
    """A configuration of a layer, and what its weights are to be.

    Args:
        layer: Makes the layer.
        shapes: What `build` gets; `None` if the layer is built.
        weights: Shape and axes of each trainable weight, by its path within
            the layer.
    """

    layer: Any
    shapes: Any
    weights: dict[str, Any]


DENSE = {"kernel": dense(4, 3), "bias": each((3,))}
LORA_DENSE = {
    "lora_kernel_a": dense(4, 2),
    "lora_kernel_b": dense(2, 3),
    "bias": each((3,)),
}
LORA_ROWS = {
    "lora_embeddings_a": rows_of(6, 2),
    "lora_embeddings_b": dense(2, 3),
}
# The inputs are query and value, of four and five features. The published
# implementation of Adam-mini keeps each output of the value projection and of
# the attention output together, so those have no heads to keep apart.
ATTENTION = {
    "query/kernel": heads((4, 2, 3), "query"),
    "query/bias": each((2, 3)),
    "key/kernel": heads((5, 2, 3), "key"),
    "key/bias": each((2, 3)),
    "value/kernel": heads((5, 2, 3), "value"),
    "value/bias": each((2, 3)),
    "attention_output/kernel": w((2, 3, 4), "dense", (2,), (0, 1)),
    "attention_output/bias": each((4,)),
}
WIDE_VALUE = {
    "value/kernel": heads((5, 2, 6), "value"),
    "value/bias": each((2, 6)),
    "attention_output/kernel": w((2, 6, 4), "dense", (2,), (0, 1)),
}
GROUPED = {
    "query/kernel": heads((4, 4, 3), "query"),
    "query/bias": each((4, 3)),
    "attention_output/kernel": w((4, 3, 4), "dense", (2,), (0, 1)),
}
GATE = {"gate/kernel": heads((4, 2, 3), "dense"), "gate/bias": each((2, 3))}
NO_BIAS = {path: a for path, a in ATTENTION.items() if "bias" not in path}
GAMMA_BETA = {"gamma": each((4,), "norm"), "beta": each((4,), "shift")}

ROWS = {
    "Dense": Row(lambda: L.Dense(3), [(2, 4)], DENSE),
    "Dense sequence": Row(lambda: L.Dense(3), [(2, 7, 4)], DENSE),
    "Dense no bias": Row(
        lambda: L.Dense(3, use_bias=False), [(2, 4)], {"kernel": dense(4, 3)}
    ),
    "Dense square": Row(
        lambda: L.Dense(4, use_bias=False), [(2, 4)], {"kernel": dense(4, 4)}
    ),
    "Dense LoRA": Row(lambda: lora(L.Dense(3), (2, 4)), None, LORA_DENSE),
    "Dense int8 LoRA": Row(
        lambda: quantized(L.Dense(3), "int8", (2, 4)), None, LORA_DENSE
    ),
    "Dense int4 LoRA": Row(
        lambda: quantized(L.Dense(3), "int4", (2, 4)), None, LORA_DENSE
    ),
    # EinsumDense: by its equation alone.
    "EinsumDense abc,cd->abd": Row(
        lambda: einsum("abc,cd->abd", (None, 3), "d"), [(2, 7, 4)], DENSE
    ),
    "EinsumDense ...x,xy->...y": Row(
        lambda: einsum("...x,xy->...y", 3, "y"), [(2, 4)], DENSE
    ),
    "EinsumDense reversed": Row(
        lambda: einsum("abc,dc->abd", (None, 3), "d"),
        [(2, 7, 4)],
        {"kernel": w((3, 4), "dense", (0,), (1,)), "bias": each((3,))},
    ),
    "EinsumDense to two": Row(
        lambda: einsum("abc,cde->abde", (None, 2, 3), "de"),
        [(2, 7, 4)],
        {
            "kernel": w((4, 2, 3), "dense", (1, 2), (0,)),
            "bias": each((2, 3)),
        },
    ),
    "EinsumDense to two, swapped": Row(
        lambda: einsum("abc,cde->abed", (None, 3, 2), "ed"),
        [(2, 7, 4)],
        {
            "kernel": w((4, 2, 3), "dense", (1, 2), (0,)),
            "bias": each((3, 2)),
        },
    ),
    "EinsumDense to two, reversed": Row(
        lambda: einsum("abc,dec->abde", (None, 2, 3), "de"),
        [(2, 7, 4)],
        {
            "kernel": w((2, 3, 4), "dense", (0, 1), (2,)),
            "bias": each((2, 3)),
        },
    ),
    "EinsumDense in the order of Gemma": Row(
        lambda: einsum("btd,ndh->btnh", (None, 2, 3)),
        [(2, 7, 4)],
        {"kernel": w((2, 4, 3), "dense", (0, 2), (1,))},
    ),
    "EinsumDense from two": Row(
        lambda: einsum("abde,dec->abc", (None, 3), "c"),
        [(2, 7, 4, 5)],
        {"kernel": w((4, 5, 3), "dense", (2,), (0, 1)), "bias": each((3,))},
    ),
    "EinsumDense per position": Row(
        lambda: einsum("abc,bcd->abd", (7, 3)),
        [(2, 7, 4)],
        {"kernel": w((7, 4, 3), "dense", (0, 2), (0, 1))},
    ),
    "EinsumDense of products": Row(
        lambda: einsum("abc,bc->ac", 4),
        [(2, 7, 4)],
        {"kernel": w((7, 4), "dense", (1,), (0, 1))},
    ),
    "EinsumDense to a number": Row(
        lambda: einsum("ab,b->a", ()),
        [(2, 4)],
        {"kernel": w((4,), "dense", (), (0,))},
    ),
    "EinsumDense scale": Row(
        lambda: einsum("ab,b->ab", 4),
        [(2, 4)],
        {"kernel": w((4,), "dense", (0,), (0,))},
    ),
    "EinsumDense bias on one of two": Row(
        lambda: einsum("abc,cde->abde", (None, 2, 3), "d"),
        [(2, 7, 4)],
        {
            "kernel": w((4, 2, 3), "dense", (1, 2), (0,)),
            "bias": each((2, 1)),
        },
    ),
    "EinsumDense LoRA": Row(
        lambda: lora(einsum("abc,cde->abde", (None, 5, 3), "de"), (2, 7, 4)),
        None,
        {
            "lora_kernel_a": w((4, 5, 2), "dense", (1, 2), (0,)),
            "lora_kernel_b": dense(2, 3),
            "bias": each((5, 3)),
        },
    ),
    # The last axis of the kernel is contracted: b goes from inputs to ranks.
    "EinsumDense LoRA reversed": Row(
        lambda: lora(einsum("abc,dec->abde", (None, 5, 3), "de"), (2, 7, 4)),
        None,
        {
            "lora_kernel_a": w((5, 3, 2), "dense", (0, 1), (2,)),
            "lora_kernel_b": w((2, 4), "dense", (0,), (1,)),
            "bias": each((5, 3)),
        },
    ),
    "EinsumDense int8 LoRA": Row(
        lambda: quantized(
            einsum("abc,dc->abd", (None, 3), "d"), "int8", (2, 7, 4)
        ),
        None,
        {
            "lora_kernel_a": w((3, 2), "dense", (0,), (1,)),
            "lora_kernel_b": w((2, 4), "dense", (0,), (1,)),
            "bias": each((3,)),
        },
    ),
    "EinsumDense int4 LoRA": Row(
        lambda: quantized(
            einsum("abc,cde->abde", (None, 5, 3)), "int4", (2, 7, 4)
        ),
        None,
        {
            "lora_kernel_a": w((4, 5, 2), "dense", (1, 2), (0,)),
            "lora_kernel_b": dense(2, 3),
        },
    ),
    "Conv1D": Row(
        lambda: L.Conv1D(3, 2),
        [(2, 7, 4)],
        {"kernel": conv(2, 4, 3), "bias": each((3,))},
    ),
    "Conv2D": Row(
        lambda: L.Conv2D(3, (2, 5)),
        [(2, 7, 7, 4)],
        {"kernel": conv(2, 5, 4, 3), "bias": each((3,))},
    ),
    "Conv3D": Row(
        lambda: L.Conv3D(3, 2),
        [(2, 7, 7, 7, 4)],
        {"kernel": conv(2, 2, 2, 4, 3), "bias": each((3,))},
    ),
    "Conv2D groups": Row(
        lambda: L.Conv2D(6, 3, groups=2, use_bias=False),
        [(2, 7, 7, 4)],
        {"kernel": conv(3, 3, 2, 6, groups=2)},
    ),
    "Conv2D channels first": Row(
        lambda: L.Conv2D(3, 2, data_format="channels_first"),
        [(2, 4, 7, 7)],
        {"kernel": conv(2, 2, 4, 3), "bias": each((3,))},
    ),
    "Conv2D LoRA": Row(
        lambda: lora(L.Conv2D(3, 5), (2, 7, 7, 4)),
        None,
        {
            "lora_kernel_a": conv(5, 5, 4, 2),
            "lora_kernel_b": dense(2, 3),
            "bias": each((3,)),
        },
    ),
    "Conv1D LoRA": Row(
        lambda: lora(L.Conv1D(3, 5, use_bias=False), (2, 7, 4)),
        None,
        {"lora_kernel_a": conv(5, 4, 2), "lora_kernel_b": dense(2, 3)},
    ),
    "Conv1DTranspose": Row(
        lambda: L.Conv1DTranspose(3, 2),
        [(2, 7, 4)],
        {"kernel": transposed(2, 3, 4), "bias": each((3,))},
    ),
    "Conv2DTranspose": Row(
        lambda: L.Conv2DTranspose(4, 2, use_bias=False),
        [(2, 7, 7, 4)],
        {"kernel": transposed(2, 2, 4, 4)},
    ),
    "Conv3DTranspose": Row(
        lambda: L.Conv3DTranspose(3, 2),
        [(2, 7, 7, 7, 4)],
        {"kernel": transposed(2, 2, 2, 3, 4), "bias": each((3,))},
    ),
    "DepthwiseConv1D": Row(
        lambda: L.DepthwiseConv1D(2, depth_multiplier=3),
        [(2, 7, 4)],
        {"kernel": depthwise(2, 4, 3), "bias": each((12,))},
    ),
    "DepthwiseConv2D": Row(
        lambda: L.DepthwiseConv2D(3, use_bias=False),
        [(2, 7, 7, 4)],
        {"kernel": depthwise(3, 3, 4, 1)},
    ),
    "SeparableConv1D": Row(
        lambda: L.SeparableConv1D(3, 2, depth_multiplier=2),
        [(2, 7, 4)],
        {
            "depthwise_kernel": depthwise(2, 4, 2),
            "pointwise_kernel": conv(1, 8, 3),
            "bias": each((3,)),
        },
    ),
    "SeparableConv2D": Row(
        lambda: L.SeparableConv2D(3, 2),
        [(2, 7, 7, 4)],
        {
            "depthwise_kernel": depthwise(2, 2, 4, 1),
            "pointwise_kernel": conv(1, 1, 4, 3),
            "bias": each((3,)),
        },
    ),
    "Embedding": Row(
        lambda: L.Embedding(6, 3), [(2, 7)], {"embeddings": rows_of(6, 3)}
    ),
    "Embedding LoRA": Row(
        lambda: lora(L.Embedding(6, 3), (2, 7)), None, LORA_ROWS
    ),
    "Embedding int8 LoRA": Row(
        lambda: quantized(L.Embedding(6, 3), "int8", (2, 7)), None, LORA_ROWS
    ),
    "ReversibleEmbedding tied": Row(
        lambda: L.ReversibleEmbedding(6, 3),
        [(2, 7)],
        {"embeddings": rows_of(6, 3)},
    ),
    "ReversibleEmbedding untied": Row(
        lambda: L.ReversibleEmbedding(6, 3, tie_weights=False),
        [(2, 7)],
        {"embeddings": rows_of(6, 3), "reverse_embeddings": dense(3, 6)},
    ),
    "SimpleRNNCell": Row(
        lambda: L.SimpleRNNCell(3),
        [(2, 4)],
        {
            "kernel": recurrent(4, 3),
            "recurrent_kernel": recurrent(3, 3),
            "bias": each((3,)),
        },
    ),
    "LSTMCell": Row(
        lambda: L.LSTMCell(3),
        [(2, 4)],
        {
            "kernel": recurrent(4, 12, gates=4),
            "recurrent_kernel": recurrent(3, 12, gates=4),
            "bias": each((12,)),
        },
    ),
    "LSTMCell no bias": Row(
        lambda: L.LSTMCell(3, use_bias=False),
        [(2, 4)],
        {
            "kernel": recurrent(4, 12, gates=4),
            "recurrent_kernel": recurrent(3, 12, gates=4),
        },
    ),
    "GRUCell": Row(
        lambda: L.GRUCell(3),
        [(2, 4)],
        {
            "kernel": recurrent(4, 9, gates=3),
            "recurrent_kernel": recurrent(3, 9, gates=3),
            "bias": each((2, 9)),
        },
    ),
    "GRUCell reset before": Row(
        lambda: L.GRUCell(3, reset_after=False),
        [(2, 4)],
        {
            "kernel": recurrent(4, 9, gates=3),
            "recurrent_kernel": recurrent(3, 9, gates=3),
            "bias": each((9,)),
        },
    ),
    "SimpleRNN": Row(
        lambda: L.SimpleRNN(3, use_bias=False),
        [(2, 7, 4)],
        {
            "simple_rnn_cell/kernel": recurrent(4, 3),
            "simple_rnn_cell/recurrent_kernel": recurrent(3, 3),
        },
    ),
    "LSTM": Row(
        lambda: L.LSTM(3), [(2, 7, 4)], lstm_weights("lstm_cell", 4, 3)
    ),
    "GRU": Row(
        lambda: L.GRU(3),
        [(2, 7, 4)],
        {
            "gru_cell/kernel": recurrent(4, 9, gates=3),
            "gru_cell/recurrent_kernel": recurrent(3, 9, gates=3),
            "gru_cell/bias": each((2, 9)),
        },
    ),
    "RNN": Row(
        lambda: L.RNN(L.LSTMCell(3, name="c")),
        [(2, 7, 4)],
        lstm_weights("c", 4, 3),
    ),
    "RNN of StackedRNNCells": Row(
        lambda: L.RNN(
            L.StackedRNNCells(
                [L.LSTMCell(3, name="a"), L.LSTMCell(2, name="b")], name="s"
            )
        ),
        [(2, 7, 4)],
        lstm_weights("s/a", 4, 3) | lstm_weights("s/b", 3, 2),
    ),
    "StackedRNNCells": Row(
        lambda: L.StackedRNNCells([L.LSTMCell(3, name="a")]),
        [(2, 4)],
        lstm_weights("a", 4, 3),
    ),
    "Bidirectional": Row(
        lambda: L.Bidirectional(L.LSTM(3, name="r")),
        [(2, 7, 4)],
        lstm_weights("forward_r/lstm_cell", 4, 3)
        | lstm_weights("backward_r/lstm_cell", 4, 3),
    ),
    "TimeDistributed": Row(
        lambda: L.TimeDistributed(L.Dense(3, name="d")),
        [(2, 7, 4)],
        {f"d/{name}": axes for name, axes in DENSE.items()},
    ),
    "Wrapper": Row(
        lambda: L.Wrapper(L.Dense(3, name="d")),
        [(2, 4)],
        {f"d/{name}": axes for name, axes in DENSE.items()},
    ),
    "Pipeline": Row(
        pipeline,
        None,
        {f"d/{name}": axes for name, axes in DENSE.items()},
    ),
    "SpectralNormalization": Row(
        lambda: L.SpectralNormalization(L.Dense(3, name="d")),
        [(2, 4)],
        {f"d/{name}": axes for name, axes in DENSE.items()},
    ),
    "SpectralNormalization of Conv2DTranspose": Row(
        lambda: L.SpectralNormalization(L.Conv2DTranspose(3, 2, name="d")),
        [(2, 7, 7, 4)],
        {"d/kernel": transposed(2, 2, 3, 4), "d/bias": each((3,))},
    ),
    "ConvLSTM1D": Row(
        lambda: L.ConvLSTM1D(3, 2),
        [(2, 7, 8, 4)],
        {
            "conv_lstm_cell/kernel": recurrent(2, 4, 12, gates=4),
            "conv_lstm_cell/recurrent_kernel": recurrent(2, 3, 12, gates=4),
            "conv_lstm_cell/bias": each((12,)),
        },
    ),
    "ConvLSTM2D": Row(
        lambda: L.ConvLSTM2D(3, 2, use_bias=False),
        [(2, 7, 8, 8, 4)],
        {
            "conv_lstm_cell/kernel": recurrent(2, 2, 4, 12, gates=4),
            "conv_lstm_cell/recurrent_kernel": recurrent(2, 2, 3, 12, gates=4),
        },
    ),
    "ConvLSTM3D": Row(
        lambda: L.ConvLSTM3D(3, 2),
        [(2, 7, 8, 8, 8, 4)],
        {
            "conv_lstm_cell/kernel": recurrent(2, 2, 2, 4, 12, gates=4),
            "conv_lstm_cell/recurrent_kernel": recurrent(
                2, 2, 2, 3, 12, gates=4
            ),
            "conv_lstm_cell/bias": each((12,)),
        },
    ),
    "MultiHeadAttention": Row(
        lambda: L.MultiHeadAttention(2, 3), [(2, 7, 4), (2, 7, 5)], ATTENTION
    ),
    "MultiHeadAttention no bias": Row(
        lambda: L.MultiHeadAttention(2, 3, use_bias=False),
        [(2, 7, 4), (2, 7, 5)],
        NO_BIAS,
    ),
    "MultiHeadAttention value_dim": Row(
        lambda: L.MultiHeadAttention(2, 3, value_dim=6),
        [(2, 7, 4), (2, 7, 5)],
        ATTENTION | WIDE_VALUE,
    ),
    "MultiHeadAttention of two axes": Row(
        lambda: L.MultiHeadAttention(2, 3, attention_axes=(1, 2)),
        [(2, 7, 6, 4), (2, 7, 6, 5)],
        ATTENTION,
    ),
    "MultiHeadAttention output_shape": Row(
        lambda: L.MultiHeadAttention(2, 3, output_shape=(6, 7)),
        [(2, 7, 4), (2, 7, 5)],
        ATTENTION
        | {
            "attention_output/kernel": w((2, 3, 6, 7), "dense", (2, 3), (0, 1)),
            "attention_output/bias": each((6, 7)),
        },
    ),
    "MultiHeadAttention gate": Row(
        lambda: L.MultiHeadAttention(2, 3, use_gate=True),
        [(2, 7, 4), (2, 7, 5)],
        ATTENTION | GATE,
    ),
    "MultiHeadAttention square": Row(
        lambda: L.MultiHeadAttention(4, 4, use_bias=False),
        [(2, 7, 4), (2, 7, 4)],
        {
            "query/kernel": heads((4, 4, 4), "query"),
            "key/kernel": heads((4, 4, 4), "key"),
            "value/kernel": heads((4, 4, 4), "value"),
            "attention_output/kernel": w((4, 4, 4), "dense", (2,), (0, 1)),
        },
    ),
    "MultiHeadAttention LoRA": Row(
        lora_attention,
        None,
        {
            "query/lora_kernel_a": heads((4, 2, 2), "query"),
            "query/lora_kernel_b": dense(2, 3),
            "query/bias": each((2, 3)),
            "key/lora_kernel_a": heads((4, 2, 2), "key"),
            "key/lora_kernel_b": dense(2, 3),
            "key/bias": each((2, 3)),
            "value/lora_kernel_a": heads((4, 2, 2), "value"),
            "value/lora_kernel_b": dense(2, 5),
            "value/bias": each((2, 5)),
            "attention_output/lora_kernel_a": w(
                (2, 5, 2), "dense", (2,), (0, 1)
            ),
            "attention_output/lora_kernel_b": dense(2, 4),
            "attention_output/bias": each((4,)),
        },
    ),
    "GroupQueryAttention": Row(
        lambda: L.GroupQueryAttention(3, 4, 2),
        [(2, 7, 4), (2, 7, 5)],
        ATTENTION | GROUPED,
    ),
    "GroupQueryAttention gate": Row(
        lambda: L.GroupQueryAttention(3, 2, 2, use_gate=True),
        [(2, 7, 4), (2, 7, 5)],
        ATTENTION | GATE,
    ),
    "Attention": Row(
        lambda: L.Attention(use_scale=True, score_mode="concat"),
        [[(2, 7, 4), (2, 7, 4)]],
        {"scale": w((), "vector"), "concat_score_weight": w((), "vector")},
    ),
    # All of them feed one number, a score.
    "AdditiveAttention": Row(
        lambda: L.AdditiveAttention(),
        [[(2, 7, 4), (2, 7, 4)]],
        {"scale": w((4,), "vector", (), (0,))},
    ),
    "BatchNormalization": Row(
        lambda: L.BatchNormalization(), [(2, 7, 4)], GAMMA_BETA
    ),
    "BatchNormalization axis": Row(
        lambda: L.BatchNormalization(axis=1), [(2, 4, 7)], GAMMA_BETA
    ),
    "GroupNormalization": Row(
        lambda: L.GroupNormalization(2), [(2, 7, 4)], GAMMA_BETA
    ),
    "LayerNormalization": Row(
        lambda: L.LayerNormalization(), [(2, 7, 4)], GAMMA_BETA
    ),
    "LayerNormalization axes": Row(
        lambda: L.LayerNormalization(axis=(1, 2)),
        [(2, 7, 4)],
        {"gamma": each((7, 4), "norm"), "beta": each((7, 4), "shift")},
    ),
    "RMSNormalization": Row(
        lambda: L.RMSNormalization(),
        [(2, 7, 4)],
        {"scale": each((4,), "norm")},
    ),
    "PReLU": Row(
        lambda: L.PReLU(), [(2, 7, 4)], {"alpha": each((7, 4), "vector")}
    ),
    "PReLU shared": Row(
        lambda: L.PReLU(shared_axes=[1]),
        [(2, 7, 4)],
        {"alpha": each((1, 4), "vector")},
    ),
    "STFTSpectrogram": Row(
        lambda: L.STFTSpectrogram(frame_length=8, window=None),
        [(2, 32, 1)],
        {"real_kernel": conv(8, 1, 5), "imag_kernel": conv(8, 1, 5)},
    ),
    "STFTSpectrogram real": Row(
        lambda: L.STFTSpectrogram(mode="real", frame_length=8, window=None),
        [(2, 32, 1)],
        {"real_kernel": conv(8, 1, 5)},
    ),
    "LayerScale": Row(
        lambda: LayerScale(0.1, 4),
        [(2, 7, 7, 4)],
        {"*": each((4,), "vector")},
    ),
}

# What older versions of Keras lack, by a word in the names of its rows.
FEATURES = {
    "ReversibleEmbedding": hasattr(L, "ReversibleEmbedding"),
    "gate": "use_gate" in inspect.signature(L.MultiHeadAttention).parameters,
    "int4": hasattr(keras.quantizers, "pack_int4"),
}
LACKED = {
    name: ROWS.pop(name)
    for name in list(ROWS)
    if not all(has for word, has in FEATURES.items() if word in name)
}

# Layers of other frameworks, whose weights nobody can name.
OPAQUE = {"FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"}
# Layers without trainable weights.
WEIGHTLESS = {
    "Activation", "ActivityRegularization", "AdaptiveAveragePooling1D",
    "AdaptiveAveragePooling2D", "AdaptiveAveragePooling3D",
    "AdaptiveMaxPooling1D", "AdaptiveMaxPooling2D", "AdaptiveMaxPooling3D",
    "Add", "AlphaDropout", "AugMix", "AutoContrast", "Average",
    "AveragePooling1D", "AveragePooling2D", "AveragePooling3D",
    "CategoryEncoding", "CenterCrop", "Concatenate",
    "ContrastLimitedAdaptiveHistogramEqualization", "Cropping1D", "Cropping2D",
    "Cropping3D", "CutMix", "Discretization", "Dot", "Dropout", "ELU",
    "Equalization", "Flatten", "GaussianDropout", "GaussianNoise",
    "GlobalAveragePooling1D", "GlobalAveragePooling2D",
    "GlobalAveragePooling3D", "GlobalMaxPooling1D", "GlobalMaxPooling2D",
    "GlobalMaxPooling3D", "HashedCrossing", "Hashing", "Identity",
    "InputLayer", "IntegerLookup", "Lambda", "LeakyReLU", "Masking",
    "MaxNumBoundingBoxes", "MaxPooling1D", "MaxPooling2D", "MaxPooling3D",
    "Maximum", "MelSpectrogram", "Minimum", "MixUp", "Multiply",
    "Normalization", "Permute", "RandAugment", "RandomBrightness",
    "RandomColorDegeneration", "RandomColorJitter", "RandomContrast",
    "RandomCrop", "RandomElasticTransform", "RandomErasing", "RandomFlip",
    "RandomGaussianBlur", "RandomGrayscale", "RandomHue", "RandomInvert",
    "RandomPerspective", "RandomPosterization", "RandomRotation",
    "RandomSaturation", "RandomSharpness", "RandomShear", "RandomTranslation",
    "RandomZoom", "ReLU", "RepeatVector", "Rescaling", "Reshape", "Resizing",
    "Softmax", "Solarization", "SpatialDropout1D", "SpatialDropout2D",
    "SpatialDropout3D", "StringLookup", "Subtract", "TextVectorization",
    "UnitNormalization", "UpSampling1D", "UpSampling2D", "UpSampling3D",
    "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D",
}  # fmt: skip


@functools.cache
def layer_of(name):
    """The layer of a row."""
    row = ROWS[name]
    layer = row.layer()
    if row.shapes is not None:
        layer.build(*row.shapes)
    return layer


def path_within(layer, variable):
    """Path of a weight within a layer, without the numbers of sublayers."""
    path = variable.path.removeprefix(f"{layer.path}/")
    return re.sub(r"_\d+(?=/)", "", path)


@pytest.mark.parametrize("name", ROWS)
def test_axes_of_every_weight(name):
    layer = layer_of(name)
    expected = ROWS[name].weights
    meanings = meanings_in(layer)
    received = {}
    for variable in layer.trainable_variables:
        meaning = meanings[id(variable)]
        (axes,) = meaning.axes  # More than one would be a guess.
        path = "*" if "*" in expected else path_within(layer, variable)
        received[path] = tuple(variable.shape), axes
        assert meaning.sure_of_layer
        assert meaning.layer == Weight.of(variable).layer_path
    assert received == expected


def test_no_layer_of_keras_is_left_out():
    # A class that Keras adds fails here until it has a row, or is found to
    # have no weights.
    classes = {
        cls
        for cls in vars(keras.layers).values()
        if inspect.isclass(cls) and issubclass(cls, keras.Layer)
    }
    with_rows = {type(layer_of(name)) for name in ROWS} | {keras.Layer}
    names = {cls.__name__ for cls in classes - with_rows}
    assert names == {n for n in WEIGHTLESS | OPAQUE if hasattr(L, n)}


def test_weightless_layers_make_no_weights():
    # By their source, as many cannot be built without data. `Normalization`
    # has a mean and a variance, which are not trained.
    for name in WEIGHTLESS - {"Normalization"}:
        # Older versions of Keras have fewer layers.
        for cls in inspect.getmro(getattr(L, name, keras.Layer)):
            if cls is keras.Layer:
                break
            if cls.__module__.startswith("keras"):
                assert "add_weight" not in inspect.getsource(cls), name
    layer = L.Normalization()
    layer.build((2, 4))
    assert layer.weights
    assert not layer.trainable_weights


def test_every_entry_is_of_a_class_of_keras():
    names = {
        f"keras.{cls.__name__}"
        for cls in all_subclasses(keras.Layer)
        if cls.__module__.partition(".")[0] == "keras"
    }
    hub = {name for name in LAYER_AXES if name.startswith("keras_hub.")}
    assert LAYER_AXES.keys() - hub <= names  # `hub`: test_real_models_hub.py.


def test_every_entry_has_weights_that_exist():
    # A wrong name in an entry is a weight that nobody would ever find.
    found = {weight for row in LACKED.values() for weight in row.weights}
    for name in ROWS:
        layer = layer_of(name)
        for variable in layer.trainable_variables:
            path = f"{layer.path}/{path_within(layer, variable)}"
            *_, parent, weight = ["", *path.split("/")]
            found |= {weight, f"{parent}/{weight}"}
    for key, entry in LAYER_AXES.items():
        if key.startswith("keras.") and isinstance(entry, dict):
            names = {name.replace("lora_kernel_a", "kernel") for name in entry}
            assert names - found <= {"*"}, key
