"""Blocking schemes: what each axis of a variable means -> the tile of a block.

A scheme is one entry of `SCHEMES`. It sees the shape of one variable and the
`Axes` that say what its axes mean, and nothing else.
"""

import math
from collections.abc import Callable

from keras_blockwise.blocking.axes import Axes
from keras_blockwise.blocking.partition import Shape

# What the authors of AdaBlock decompose: windows of convolutions, and chunks of
# the rest.
MOST_IN_WINDOW = 32
MOST_IN_CHUNK = 10
CHUNKED = (
    *("dense", "embedding", "recurrent", "unknown"),
    *("key", "query", "value"),
)


def keep(axes: Shape, shape: Shape) -> Shape:
    """The tile that is one entry wide on `axes` and whole on all others."""
    return tuple(
        1 if axis in axes else max(n, 1) for axis, n in enumerate(shape)
    )


def whole(shape: Shape, axes: Axes) -> Shape:
    return keep((), shape)


def none(shape: Shape, axes: Axes) -> None:
    """No blocks: nothing adapts."""


def coordinate(shape: Shape, axes: Axes) -> Shape:
    return keep(tuple(range(len(shape))), shape)


def output_unit(shape: Shape, axes: Axes) -> Shape:
    return keep(axes.output, shape)


def input_unit(shape: Shape, axes: Axes) -> Shape:
    tile = keep(axes.input, shape)
    return (*tile[:-1], tile[-1] // axes.groups) if axes.groups > 1 else tile


def filter_(shape: Shape, axes: Axes) -> Shape:
    if not axes.spatial:
        return output_unit(shape, axes)
    return keep(axes.output + axes.input, shape)


def head(shape: Shape, axes: Axes) -> Shape:
    if not axes.head:
        return output_unit(shape, axes)
    return keep(axes.head, shape)


def adam_mini(shape: Shape, axes: Axes) -> Shape:
    """Adam-mini 1.1.1 (arXiv:2406.16793): whole where its table is silent."""
    return ADAM_MINI.get(axes.kind, whole)(shape, axes)


def adam_mini_short(shape: Shape, axes: Axes) -> Shape:
    """Its authors' advice below 10,000 steps: one block per value matrix."""
    return (whole if axes.kind == "value" else adam_mini)(shape, axes)


def adablock(shape: Shape, axes: Axes) -> Shape:
    """AdaBlock (arXiv:1905.10757): chunks of what leaves an input unit."""
    tile = list(coordinate(shape, axes))
    if axes.spatial:
        window = keep(axes.input + axes.output, shape)
        return window if math.prod(window) <= MOST_IN_WINDOW else tuple(tile)
    if axes.kind in CHUNKED and len(shape) > 1:
        chunked = axes.input if axes.kind == "embedding" else axes.output
        axis = max(chunked, default=len(shape) - 1)
        n = max(shape[axis], 1)
        tile[axis] = max(c for c in range(1, MOST_IN_CHUNK + 1) if n % c == 0)
    return tuple(tile)


def adalayer_sgd(shape: Shape, axes: Axes) -> Shape | None:
    """SGD+Adalayer (arXiv:2407.07972): of hidden layers, norms alone adapt."""
    return whole(shape, axes) if axes.kind in ("norm", "shift") else None


ADAM_MINI = {
    "bias": coordinate,
    "dense": output_unit,
    "embedding": output_unit,
    "key": head,
    "query": head,
    "shift": coordinate,
    "value": output_unit,
}

SCHEMES: dict[str, Callable[[Shape, Axes], Shape | None]] = {
    "coordinate": coordinate,
    "output_unit": output_unit,
    "input_unit": input_unit,
    "filter": filter_,
    "head": head,
    "variable": whole,
    "layer": whole,
    "model": whole,
    "adam_mini": adam_mini,
    "adam_mini_short": adam_mini_short,
    "adablock": adablock,
    "adalayer": whole,
    "adalayer_sgd": adalayer_sgd,
    "none": none,
}

# What takes the place of a scheme in the output layer.
IN_OUTPUT_LAYER = {"adalayer": output_unit, "adalayer_sgd": output_unit}

# Schemes whose blocks span variables: the name of the accumulator they share.
GROUPS: dict[str, Callable[[str], str]] = {
    "layer": lambda layer_path: layer_path,
    "model": lambda layer_path: "/",
}
