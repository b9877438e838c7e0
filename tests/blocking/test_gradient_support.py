"""The blocks of every layer, found from its gradients and without a table.

A unit is a number that a layer computes. The weights that feed it are those
from which it has a gradient, and they must be the blocks of `output_unit`. The
weights that leave one input unit are those that have a gradient where all other
inputs are zero, and they must be the blocks of `input_unit`; those between one
input channel and one unit are the blocks of `filter`. All on shapes whose sizes
differ, and on shapes whose sizes are all equal.

What a layer does with its units must be out of the way. Attention is seen
between its projections, gates before their activations, and one of two factors
through the identity in place of the other.

Not covered, since there is nothing to see: the rows of an Embedding that is
never reversed, which looks them up and adds nothing, and that biases and scales
have one block per entry where several entries feed one unit, as the two biases
of a GRU do. Layers that hold other layers have no weights of their own.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from helpers.training import gradients_of
from keras_blockwise.blocking.layer_axes import meanings_in
from keras_blockwise.blocking.schemes import SCHEMES

L = keras.layers
SIZES = {"oblong": (2, 3, 4), "square": (3, 3, 3)}


@dataclass
class Probe:
    """A layer, and how to see the units between which its weights lie.

    Args:
        layer: The layer.
        shape: Shape of its input, with a batch of one.
        weights: Paths of the weights to look at, within the layer.
        inputs: Those of them that are multiplied with the input.
        channels: The axis of the input and of the units that indexes channels:
            the sum over all others is one unit. `None`: each entry is a unit.
        run: The input to the units; by default, the layer.
        prepare: Changes the weights, which are random.
    """

    layer: keras.Layer
    shape: tuple[int, ...]
    weights: tuple[str, ...] = ("kernel", "bias")
    inputs: tuple[str, ...] = ("kernel",)
    channels: int | None = None
    run: Callable[..., Any] | None = None
    prepare: Callable[[], None] = lambda: None


def dense_probe(k, n, m):
    return Probe(L.Dense(m), (1, k, n))


def einsum_probe(equation, inputs, outputs, bias_axes, k, n, m):
    """An EinsumDense, with sizes by the letters k, n and m."""
    sizes = {"k": k, "n": n, "m": m}
    layer = L.EinsumDense(
        equation, tuple(sizes[i] for i in outputs), bias_axes=bias_axes
    )
    weights = ("kernel", "bias") if bias_axes else ("kernel",)
    return Probe(layer, (1, *(sizes[i] for i in inputs)), weights)


def conv_probe(cls, rank, k, n, m, **kwargs):
    return Probe(cls(m, k, **kwargs), (1, *[k + 1] * rank, n), channels=-1)


def grouped_conv(rank, k, n, m):
    cls = getattr(L, f"Conv{rank}D")
    return conv_probe(cls, rank, k, 2 * n, 2 * m, groups=2)


def depthwise_probe(cls, rank, k, n, m):
    layer = cls(k, depth_multiplier=m)
    # The input unit is a channel, of which there are m in the output.
    return Probe(layer, (1, *[k + 1] * rank, n), channels=-1)


def separable_depthwise(cls, rank, k, n, m):
    """The depthwise half, through a pointwise half that does nothing."""
    layer = cls(n * m, k, depth_multiplier=m)
    return Probe(
        layer,
        (1, *[k + 1] * rank, n),
        ("depthwise_kernel", "bias"),
        ("depthwise_kernel",),
        channels=-1,
        prepare=lambda: set_identity(layer.pointwise_kernel),
    )


def separable_pointwise(cls, rank, k, n, m):
    layer = cls(m, k, depth_multiplier=2)
    shape = (1, *[k + 1] * rank, n)
    return Probe(layer, shape, ("pointwise_kernel",), (), channels=-1)


def set_identity(variable):
    size = variable.shape[-1]
    variable.assign(np.eye(size).reshape(variable.shape))


def reversed_embedding(weight, tied, k, n, m):
    layer = L.ReversibleEmbedding(m, n, tie_weights=tied)
    layer.build()
    return Probe(
        layer,
        (1, n),
        (weight,),
        (weight,),
        run=lambda x: layer(x, reverse=True),
    )


def embedding_lora(k, n, m):
    """Not its rows, but what multiplies them."""
    layer = L.Embedding(n, m)
    layer.build()
    layer.enable_lora(k)
    return Probe(
        layer,
        (1,),
        ("lora_embeddings_b",),
        (),
        run=lambda x: layer(np.arange(n)),
    )


def lora_a(make, units, k, n, m):
    """The first factor, through a second that is the identity."""
    probe = make(k, n, m)
    probe.layer.build(probe.shape)
    probe.layer.enable_lora(units(k, n, m))
    probe.weights = probe.inputs = ("lora_kernel_a",)
    probe.prepare = lambda: set_identity(probe.layer.lora_kernel_b)
    return probe


def lora_b(make, k, n, m):
    """The second factor: it feeds the columns of the kernel."""
    probe = make(k, n, m)
    probe.layer.build(probe.shape)
    probe.layer.enable_lora(2)
    probe.weights, probe.inputs = ("lora_kernel_b",), ()
    return probe


def lora_b_of_inputs(make, k, n, m):
    """Where it takes the inputs, through a first that is the identity."""
    probe = make(k, n, m)
    probe.layer.build(probe.shape)
    probe.layer.enable_lora(k * m)
    probe.weights = probe.inputs = ("lora_kernel_b",)
    probe.prepare = lambda: set_identity(probe.layer.lora_kernel_a)
    return probe


class Gates:
    """An activation that keeps the pre-activations that it is given.

    They are the units of a recurrent layer. Nothing is passed on to what the
    gates control, so that each has a gradient from its own weights only.
    """

    def __init__(self):
        self.seen = []

    def __call__(self, x):
        self.seen.append(x)
        return keras.ops.stop_gradient(keras.ops.sigmoid(x))


def cell(cls, weight, k, n, m, **kwargs):
    """A recurrent cell, seen from its input or from its state."""
    gates = Gates()
    if cls is not L.SimpleRNNCell:
        kwargs["recurrent_activation"] = gates
    layer = cls(m, activation=gates, **kwargs)
    return recurrent_probe(layer, gates, weight, (1, n), (1, m))


def conv_lstm(rank, weight, k, n, m):
    gates = Gates()
    layer = getattr(L, f"ConvLSTM{rank}D")(
        m, k, padding="same", activation=gates, recurrent_activation=gates
    )
    window = [k + 1] * rank
    layer.build((1, 2, *window, n))
    return recurrent_probe(
        layer.cell, gates, weight, (1, *window, n), (1, *window, m), channels=-1
    )


def recurrent_probe(layer, gates, weight, input_shape, state_shape, **kwargs):
    def run(x):
        gates.seen.clear()
        inputs, state = np.ones(input_shape, "float32"), x
        if weight == "kernel":
            inputs, state = x, np.ones(state_shape, "float32")
        layer(inputs, [state] * (1 + ("LSTM" in type(layer).__name__)))
        return gates.seen

    is_kernel = weight == "kernel"
    # The two biases of a GRU go to one unit; see above.
    has_bias = is_kernel and getattr(layer, "reset_after", None) is not True
    return Probe(
        layer,
        input_shape if is_kernel else state_shape,
        (weight, "bias") if has_bias else (weight,),
        (weight,),
        run=run,
        **kwargs,
    )


def attention(k, n, m, grouped=False, **kwargs):
    if grouped:
        layer = L.GroupQueryAttention(m, 2 * k, k, **kwargs)
    else:
        layer = L.MultiHeadAttention(k, m, **kwargs)
    layer.build((1, 2, n), (1, 2, n))
    return layer


def projection(name, k, n, m, **kwargs):
    """One of the projections of an attention layer, by itself."""
    layer = attention(k, n, m, **kwargs)
    (child,) = [
        child
        for child in layer._flatten_layers(include_self=False)
        if child.name == name
    ]
    kernel = f"{name}/kernel"
    heads = 2 * k if kwargs.get("grouped") else k
    shape = (1, heads, m) if name == "attention_output" else (1, n)
    return Probe(
        layer, (1, *shape), (kernel, f"{name}/bias"), (kernel,), run=child
    )


def entries(make, shape, *weights):
    """Weights that are not multiplied with the input alone."""
    return lambda k, n, m: Probe(make(k, n, m), shape(k, n, m), weights, ())


def sequence(k, n, m):
    return 1, k, n


def self_attention(make, *weights):
    def make_probe(k, n, m):
        layer = make()
        return Probe(layer, (1, k, n), weights, (), run=lambda x: layer([x, x]))

    return make_probe


def prelu(k, n, m, **kwargs):
    layer = L.PReLU(**kwargs)
    return Probe(
        layer, (1, k, n), ("alpha",), (), run=lambda x: layer(-np.abs(x))
    )


def stft(weight, k, n, m):
    layer = L.STFTSpectrogram(frame_length=8, frame_step=4, window=None)
    return Probe(layer, (1, 16, 1), (weight,), (), channels=-1)


# Not public, but in a public application.
LayerScale = inspect.getmodule(keras.applications.ConvNeXtTiny).LayerScale
to_two = partial(einsum_probe, "abc,cde->abde", "kn", "kkm", "de")
to_two_reversed = partial(einsum_probe, "abc,dec->abde", "kn", "kkm", "de")
GAMMA_BETA = ("gamma", "beta")
PROBES = {
    "Dense": dense_probe,
    "Dense LoRA a": partial(lora_a, dense_probe, lambda k, n, m: m),
    "Dense LoRA b": partial(lora_b, dense_probe),
    "EinsumDense abc,cd->abd": partial(
        einsum_probe, "abc,cd->abd", "kn", "km", "d"
    ),
    "EinsumDense abc,dc->abd": partial(
        einsum_probe, "abc,dc->abd", "kn", "km", "d"
    ),
    "EinsumDense abc,cde->abde": to_two,
    "EinsumDense abc,dec->abde": to_two_reversed,
    "EinsumDense abc,cde->abed": partial(
        einsum_probe, "abc,cde->abed", "kn", "kkm", "ed"
    ),
    "EinsumDense btd,ndh->btnh": partial(
        einsum_probe, "btd,ndh->btnh", "kn", "kkm", "nh"
    ),
    "EinsumDense abde,dec->abc": partial(
        einsum_probe, "abde,dec->abc", "kkn", "km", "c"
    ),
    "EinsumDense abc,bcd->abd": partial(
        einsum_probe, "abc,bcd->abd", "kn", "km", None
    ),
    "EinsumDense abc,bc->ac": partial(
        einsum_probe, "abc,bc->ac", "kn", "n", None
    ),
    "EinsumDense abc,cb->ab": partial(
        einsum_probe, "abc,cb->ab", "kn", "k", None
    ),
    "EinsumDense ab,b->a": partial(einsum_probe, "ab,b->a", "n", "", None),
    "EinsumDense ab,b->ab": partial(einsum_probe, "ab,b->ab", "n", "n", None),
    "EinsumDense LoRA a": partial(lora_a, to_two, lambda k, n, m: m),
    "EinsumDense LoRA b": partial(lora_b, to_two),
    "EinsumDense reversed LoRA a": partial(
        lora_a, to_two_reversed, lambda k, n, m: n
    ),
    "EinsumDense reversed LoRA b": partial(lora_b_of_inputs, to_two_reversed),
    "Conv1D": partial(conv_probe, L.Conv1D, 1),
    "Conv2D": partial(conv_probe, L.Conv2D, 2),
    "Conv3D": partial(conv_probe, L.Conv3D, 3),
    "Conv1D grouped": partial(grouped_conv, 1),
    "Conv2D grouped": partial(grouped_conv, 2),
    "Conv2D LoRA a": partial(
        lora_a, partial(conv_probe, L.Conv2D, 2), lambda k, n, m: m
    ),
    "Conv2D LoRA b": partial(lora_b, partial(conv_probe, L.Conv2D, 2)),
    "Conv1DTranspose": partial(conv_probe, L.Conv1DTranspose, 1),
    "Conv2DTranspose": partial(conv_probe, L.Conv2DTranspose, 2),
    "Conv3DTranspose": partial(conv_probe, L.Conv3DTranspose, 3),
    "DepthwiseConv1D": partial(depthwise_probe, L.DepthwiseConv1D, 1),
    "DepthwiseConv2D": partial(depthwise_probe, L.DepthwiseConv2D, 2),
    "SeparableConv1D depthwise": partial(
        separable_depthwise, L.SeparableConv1D, 1
    ),
    "SeparableConv2D depthwise": partial(
        separable_depthwise, L.SeparableConv2D, 2
    ),
    "SeparableConv1D pointwise": partial(
        separable_pointwise, L.SeparableConv1D, 1
    ),
    "SeparableConv2D pointwise": partial(
        separable_pointwise, L.SeparableConv2D, 2
    ),
    "Embedding LoRA b": embedding_lora,
    "ReversibleEmbedding tied": partial(reversed_embedding, "embeddings", True),
    "ReversibleEmbedding untied": partial(
        reversed_embedding, "reverse_embeddings", False
    ),
    "AdditiveAttention": self_attention(L.AdditiveAttention, "scale"),
    "Attention": self_attention(
        partial(L.Attention, use_scale=True, score_mode="concat"),
        "scale",
        "concat_score_weight",
    ),
    "BatchNormalization": entries(
        lambda k, n, m: L.BatchNormalization(), sequence, *GAMMA_BETA
    ),
    "BatchNormalization axis": entries(
        lambda k, n, m: L.BatchNormalization(axis=1), sequence, *GAMMA_BETA
    ),
    "GroupNormalization": entries(
        lambda k, n, m: L.GroupNormalization(n), sequence, *GAMMA_BETA
    ),
    "LayerNormalization": entries(
        lambda k, n, m: L.LayerNormalization(), sequence, *GAMMA_BETA
    ),
    "LayerNormalization axes": entries(
        lambda k, n, m: L.LayerNormalization(axis=(1, 2)), sequence, *GAMMA_BETA
    ),
    "RMSNormalization": entries(
        lambda k, n, m: L.RMSNormalization(), sequence, "scale"
    ),
    "PReLU": prelu,
    "PReLU shared": partial(prelu, shared_axes=[1]),
    "LayerScale": entries(
        lambda k, n, m: LayerScale(1.0, n), sequence, "variable"
    ),
    "STFTSpectrogram real": partial(stft, "real_kernel"),
    "STFTSpectrogram imaginary": partial(stft, "imag_kernel"),
}
for weight in ("kernel", "recurrent_kernel"):
    for cls in (L.SimpleRNNCell, L.LSTMCell, L.GRUCell):
        PROBES[f"{cls.__name__} {weight}"] = partial(cell, cls, weight)
    PROBES[f"GRUCell before {weight}"] = partial(
        cell, L.GRUCell, weight, reset_after=False
    )
    for rank in (1, 2, 3):
        PROBES[f"ConvLSTM{rank}D {weight}"] = partial(conv_lstm, rank, weight)
for name in ("query", "key", "value", "attention_output"):
    PROBES[f"MultiHeadAttention {name}"] = partial(projection, name)
    PROBES[f"GroupQueryAttention {name}"] = partial(
        projection, name, grouped=True
    )
if not hasattr(L, "ReversibleEmbedding"):  # Older versions of Keras.
    del PROBES["ReversibleEmbedding tied"], PROBES["ReversibleEmbedding untied"]
if "use_gate" in inspect.signature(L.MultiHeadAttention).parameters:
    for grouped in (False, True):  # Older versions of Keras have no gate.
        PROBES[f"gate, {grouped=}"] = partial(
            projection, "gate", use_gate=True, grouped=grouped
        )


def units_of(outputs, axis):
    """Each unit as a number: entries, or sums over all axes but one."""
    outputs = outputs if isinstance(outputs, list) else [outputs]
    units = []
    for x in outputs:
        if axis is not None:
            x = ops.sum(ops.reshape(x, [-1, x.shape[axis]]), 0)
        units += ops.unstack(ops.reshape(x, [-1]))
    return units


def supports(probe, x, weights, axis):
    """For each weight: which of its entries feed each of the units."""
    gradients = gradients_of(
        lambda: units_of(probe.run(x), axis), weights.values()
    )
    return {
        path: set(map(support, columns)) - {frozenset()}
        for path, columns in zip(weights, zip(*gradients))
    }


def support(gradient):
    return frozenset(np.flatnonzero(gradient))


def entries_of_blocks(shape, axes, scheme):
    """The entries of each block."""
    tile = SCHEMES[scheme](shape, axes)
    members = {}
    for i, index in enumerate(np.ndindex(*shape)):
        corner = tuple(a // size for a, size in zip(index, tile))
        members.setdefault(corner, set()).add(i)
    return set(map(frozenset, members.values()))


def only(x, channel, axis):
    """The input with zeros everywhere but in one channel, or one entry."""
    mask = np.zeros_like(x)
    if axis is None:
        mask.flat[channel] = 1.0
    else:
        np.moveaxis(mask, axis, 0)[channel] = 1.0
    return x * mask


def prepared(name, size):
    """A probe with random weights, its input, its weights and their axes."""
    probe = PROBES[name](*SIZES[size])
    if probe.run is None:
        probe.run = probe.layer
    rng = np.random.default_rng(0)
    x = rng.normal(size=probe.shape).astype("float32")
    probe.run(x)
    prefix = f"{probe.layer.path}/"
    weights = {}
    for variable in probe.layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
        path = variable.path.removeprefix(prefix)
        weights[re.sub(r"_\d+$", "", path)] = variable
    probe.prepare()
    meanings = meanings_in(probe.layer)
    axes = {path: meanings[id(v)].axes[0] for path, v in weights.items()}
    return probe, x, {path: weights[path] for path in probe.weights}, axes


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROBES)
def test_units(name, size):
    probe, x, weights, axes = prepared(name, size)
    shapes = {path: tuple(v.shape) for path, v in weights.items()}

    def expected(path, scheme):
        return entries_of_blocks(shapes[path], axes[path], scheme)

    feeding = supports(probe, x, weights, probe.channels)
    for path in weights:
        assert feeding[path] == expected(path, "output_unit"), path

    weights = {path: weights[path] for path in probe.inputs}
    num_inputs = x.size if probe.channels is None else x.shape[probe.channels]
    leaving = {path: set() for path in weights}
    between = {path: set() for path in weights}
    for i in range(num_inputs):
        masked = only(x, i, probe.channels)
        found = supports(probe, masked, weights, probe.channels)
        for path in weights:
            leaving[path].add(frozenset().union(*found[path]))
            between[path] |= found[path]
    for path in weights:
        assert leaving[path] == expected(path, "input_unit"), path
        if axes[path].spatial:
            assert between[path] == expected(path, "filter"), path
