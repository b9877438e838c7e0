"""What the axes of a variable may mean, from its path, shape and siblings.

Used where no model is at hand. A name and a shape do not always decide: a
square kernel without a default layer name may be a Dense or a transposed one.
`infer` returns every meaning that fits, the likeliest first.
"""

import math
import re
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from keras_blockwise.blocking.axes import Axes
from keras_blockwise.blocking.axes import Meaning
from keras_blockwise.blocking.axes import Weight
from keras_blockwise.blocking.partition import Shape

# The kind of the weights that have one entry per unit, by name.
VECTORS = {
    "alpha": "vector",
    "beta": "shift",
    "bias": "bias",
    "gamma": "norm",
}


def infer(weights: Sequence[Weight]) -> list[Meaning]:
    """The role that each variable of an optimizer may have."""
    layers: list[str] = []
    siblings: dict[str, dict[str, Shape]] = {}
    repeated: dict[str, int] = {}
    for path, shape in weights:
        layer_path, _, name = path.rpartition("/")
        count = repeated.setdefault(layer_path, 0)
        layer = f"{layer_path}#{count}" if count else layer_path
        if name in siblings.get(layer, {}):  # Two layers have this path.
            repeated[layer_path] += 1
            layer = f"{layer_path}#{count + 1}"
        layers.append(layer)
        siblings.setdefault(layer, {})[name] = shape
    return [
        Meaning(
            layer,
            possible_axes(weight, siblings[layer]),
            sure_of_layer=repeated[weight.layer_path] == 0,
        )
        for weight, layer in zip(weights, layers)
    ]


def possible_axes(
    weight: Weight, siblings: Mapping[str, Shape]
) -> tuple[Axes, ...]:
    """Every meaning of the axes that fits what is known of a variable.

    Args:
        weight: The variable.
        siblings: Shape of each variable of its layer, by name.

    Returns:
        At least one `Axes`, the likeliest first.
    """
    name, shape, rank = weight.name, weight.shape, len(weight.shape)
    parent_path = weight.layer_path.rpartition("/")[0]
    layer = default_name(weight.layer_path)
    if layer == "additive_attention":
        return (fan_in(rank),)
    if name == "scale":
        norm = vector(rank, "norm")
        return (norm,) if layer == "rms_normalization" else (norm, fan_in(rank))
    if name in VECTORS or rank <= 1:
        return (vector(rank, VECTORS.get(name, "vector")),)
    if name in RECURRENT and "recurrent_kernel" in siblings:
        return (recurrent(siblings["recurrent_kernel"]),)
    if name in KERNELS:
        return (KERNELS[name](rank),)
    if name != "kernel":
        return Axes(), convolution(rank), transposed(rank), vector(rank)
    if layer in LAYERS:
        return (LAYERS[layer](rank),)
    likely = projection(layer, rank)
    if likely and default_name(parent_path) in ATTENTION:
        return tuple(likely)
    likely += [convolution(rank), transposed(rank)]
    if rank > 2:
        likely += [depthwise(rank)]
    likely += every_split(rank)
    if "bias" not in siblings:
        return tuple(likely)
    bias = siblings["bias"]
    fitting = tuple(axes for axes in likely if bias == bias_shape(axes, shape))
    return fitting or (Axes(), *likely)


def default_name(path: str) -> str:
    """The last name of a path, without the number that Keras adds to it."""
    return re.sub(r"_\d+$", "", path.rpartition("/")[2])


def vector(rank: int, kind: str = "vector") -> Axes:
    """Biases and scales: every entry belongs to a unit of its own."""
    return Axes(output=tuple(range(rank)), kind=kind)


def fan_in(rank: int) -> Axes:
    """All entries feed one unit, as the scale of AdditiveAttention does."""
    return Axes(input=tuple(range(rank)), kind="vector")


def convolution(rank: int) -> Axes:
    """`(*window, in, out)`; with an empty window, Dense."""
    window = tuple(range(rank - 2))
    kind = "conv" if window else "dense"
    return Axes((rank - 1,), (rank - 2,), window, kind=kind)


def transposed(rank: int) -> Axes:
    """`(*window, out, in)`; with an empty window, a reversed EinsumDense."""
    axes = convolution(rank)
    return replace(axes, output=axes.input, input=axes.output)


def depthwise(rank: int) -> Axes:
    """`(*window, in, multiplier)`; output unit `in * multiplier + m`."""
    return replace(convolution(rank), output=(rank - 2, rank - 1))


def recurrent(shape: Shape) -> Axes:
    """`(*window, in, gates * units)`, by the recurrent kernel: units in."""
    gates = shape[-1] // max(shape[-2], 1)
    return replace(convolution(len(shape)), kind="recurrent", gates=gates)


def embedding(rank: int) -> Axes:
    """`(vocabulary, dim)`: a row is a unit."""
    return replace(transposed(rank), kind="embedding")


def projection(layer: str, rank: int) -> list[Axes]:
    """Attention: `(in, heads, head_dim)`, and `(heads, head_dim, out)`."""
    if rank == 3 and layer in ("query", "key", "value", "gate"):
        kind = "dense" if layer == "gate" else layer
        return [Axes(output=(1, 2), input=(0,), head=(1,), kind=kind)]
    if rank == 3 and layer == "attention_output":
        return [Axes(output=(2,), input=(0, 1), kind="dense")]
    return []


def every_split(rank: int) -> list[Axes]:
    """An EinsumDense kernel may have its output units on any axes."""
    axes = range(rank)
    return [
        Axes(output, tuple(set(axes) - set(output)), kind="dense")
        for size in range(1, rank)
        for output in combinations(axes, size)
    ]


def bias_shape(axes: Axes, shape: Shape) -> Shape:
    """The shape of a bias over the output units of a kernel."""
    units = tuple(shape[axis] for axis in axes.output)
    if axes.spatial and len(axes.output) == 2:
        return (math.prod(units),)
    return units


# Names of the kernels of a recurrent layer.
RECURRENT = ("kernel", "recurrent_kernel")

# Names that Keras gives to one kind of variable only.
KERNELS = {
    "depthwise_kernel": depthwise,
    "embeddings": embedding,
    "imag_kernel": convolution,
    "pointwise_kernel": convolution,
    "real_kernel": convolution,
    "reverse_embeddings": convolution,
}

# Default names of layers whose projections have names of Keras's own.
ATTENTION = {"grouped_query_attention", "multi_head_attention"}

# Default names of layers.
LAYERS = {
    "conv1d": convolution,
    "conv1d_transpose": transposed,
    "conv2d": convolution,
    "conv2d_transpose": transposed,
    "conv3d": convolution,
    "conv3d_transpose": transposed,
    "dense": convolution,
    "depthwise_conv1d": depthwise,
    "depthwise_conv2d": depthwise,
}
