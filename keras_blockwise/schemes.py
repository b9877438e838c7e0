"""Blocking schemes: what each axis of a variable means -> the tile of a block.

A scheme is one entry of `SCHEMES`. It sees the shape of one variable and the
`Axes` that say what its axes mean, and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass

from keras_blockwise.partition import Shape


@dataclass(frozen=True)
class Axes:
    """What the axes of a variable index in the map that it parametrises.

    Args:
        output: Axes that index the units of the map's output.
        input: Axes that index the units of its input. A depthwise kernel's
            channel axis is both.
        spatial: Axes that index a position in a convolution window.

    `Axes()` says that nothing is known, or nothing is to be told apart.
    """

    output: Shape = ()
    input: Shape = ()
    spatial: Shape = ()


def keep(axes: Shape, shape: Shape) -> Shape:
    """The tile that is one entry wide on `axes` and whole on all others."""
    return tuple(
        1 if axis in axes else max(n, 1) for axis, n in enumerate(shape)
    )


def whole(shape: Shape, axes: Axes) -> Shape:
    return keep((), shape)


def coordinate(shape: Shape, axes: Axes) -> Shape:
    return keep(tuple(range(len(shape))), shape)


def output_unit(shape: Shape, axes: Axes) -> Shape:
    return keep(axes.output, shape)


def input_unit(shape: Shape, axes: Axes) -> Shape:
    return keep(axes.input, shape)


def filter_(shape: Shape, axes: Axes) -> Shape:
    if not axes.spatial:
        return output_unit(shape, axes)
    return keep(axes.output + axes.input, shape)


SCHEMES: dict[str, Callable[[Shape, Axes], Shape]] = {
    "coordinate": coordinate,
    "output_unit": output_unit,
    "input_unit": input_unit,
    "filter": filter_,
    "variable": whole,
    "layer": whole,
    "model": whole,
}

# Schemes whose blocks span variables: the name of the accumulator they share.
GROUPS: dict[str, Callable[[str], str]] = {
    "layer": lambda layer_path: layer_path,
    "model": lambda layer_path: "/",
}
