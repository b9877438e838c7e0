"""Which variables are hidden matrices, and which belong to the output layer."""

import re
from collections.abc import Sequence
from typing import Any

import keras

from keras_blockwise.blocking.axes import Axes
from keras_blockwise.blocking.axes import Weight
from keras_blockwise.blocking.partition import Matrices
from keras_blockwise.blocking.partition import Shape

Layer = Any
Variable = Any

# Kinds of variables (see `Axes`) that map units to units.
KINDS = ("conv", "dense", "key", "query", "recurrent", "value")


def matrices_of(shape: Shape, axes: Axes, per_head: bool) -> Matrices | None:
    """How a variable maps its inputs to its outputs, as matrices.

    Args:
        shape: Shape of the variable.
        axes: What its axes mean.
        per_head: Whether each attention head is a matrix of its own.

    Returns:
        Its matrices: one, or one for each gate or head. `None` if it is not a
        matrix: where output units have inputs of their own, as in depthwise
        and grouped convolutions, or there is only one unit on a side.
    """
    if (
        axes.kind not in KINDS
        or axes.groups > 1
        or set(axes.input) & set(axes.output)
        or len(shape) < 2
        or 0 in shape
        or shape[-1] % axes.gates
    ):
        return None
    tile = [
        1 if per_head and axis in axes.head else n
        for axis, n in enumerate(shape)
    ]
    tile[-1] //= axes.gates
    sides = [
        tuple(i for i in range(len(shape)) if (i in axes.output) is is_output)
        for is_output in (False, True)
    ]
    # Of a matrix and its transpose, always the same one.
    matrices = Matrices(shape, tuple(tile), min(sides))
    return matrices if min(matrices.matrix_shape[1:]) > 1 else None


def output_positions(
    variables: Sequence[Variable],
    layers: Sequence[str],
    kinds: Sequence[str],
    model: Layer | None,
    output_layer: str | None,
) -> tuple[set[int], list[str]]:
    """Positions of the variables of the output layers.

    Args:
        variables: All variables.
        layers: The layer of each.
        kinds: What each is; see `Axes`.
        model: The model, if it is known.
        output_layer: What a user says, if anything.

    Returns:
        The positions, and the paths of the kernels there that are a guess.
    """
    weights = [Weight.of(variable) for variable in variables]
    if output_layer is not None:
        others = [] if model is None else [v.path for v in model.variables]
        return matching(output_layer, weights, others), []
    makers = None if model is None else last_layers(model)
    kernels = [
        i
        for i, weight in enumerate(weights)
        if kinds[i] in KINDS and len(weight.shape) > 1
    ]
    candidates = [kernels]
    if makers is not None:
        candidates = [
            [i for i in kernels if id(variables[i]) in own]
            for own in ({id(v) for v in maker.variables} for maker in makers)
        ]
    last = {layers[max(own)] for own in candidates if own}
    positions = {i for i, layer in enumerate(layers) if layer in last}
    if makers is not None:
        return positions, []
    return positions, [weights[i].path for i in kernels if i in positions]


def matching(
    output_layer: str, weights: Sequence[Weight], other_paths: Sequence[str]
) -> set[int]:
    """Positions of the variables of the layer that a user names.

    Args:
        output_layer: A path of a layer or of a variable, or a regular
            expression.
        weights: All variables.
        other_paths: Paths of variables that are not trained now.
    """

    def matches(path: str) -> bool:
        return any(
            output_layer == name or re.fullmatch(output_layer, name)
            for name in (path, path.rpartition("/")[0])
        )

    if not any(map(matches, (*other_paths, *(w.path for w in weights)))):
        paths = "\n  ".join(weight.path for weight in weights)
        raise ValueError(
            "`output_layer` must be the path of a layer or of a variable, or a "
            "regular expression that matches one. Received: "
            f"output_layer={output_layer!r}, which matches none of\n  {paths}"
        )
    return {i for i, weight in enumerate(weights) if matches(weight.path)}


def last_layers(model: Layer) -> list[Layer] | None:
    """The layers that make the outputs of a model; `None` if only code can say.

    Layers without weights are passed over.
    """
    if isinstance(model, keras.Sequential):
        with_weights = [layer for layer in model.layers if layer.weights]
        return last_of(with_weights[-1]) if with_weights else []
    operations = getattr(model, "operations", None)
    if operations is None:
        return None
    makers = {
        id(tensor): operation
        for operation in operations
        for tensor in keras.tree.flatten(operation.output)
    }
    # What makes a tensor is known of first calls alone: a layer that is called
    # again, or a model in a model, makes an output if it is the last.
    with_weights = [layer for layer in model.layers if layer.weights]
    found: list[Layer] = []
    tensors = list(model.outputs)
    seen: set[int] = set()
    while tensors:
        tensor = tensors.pop()
        maker = makers.get(id(tensor), with_weights and with_weights[-1])
        if not maker or id(maker) in seen:
            continue
        seen.add(id(maker))
        if getattr(maker, "weights", ()):
            layers = last_of(maker)
            if layers is None:
                return None
            found += layers
        else:
            tensors += keras.tree.flatten(maker.input)
    return found


def last_of(layer: Layer) -> list[Layer] | None:
    return last_layers(layer) if isinstance(layer, keras.Model) else [layer]
