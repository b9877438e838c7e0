"""Models as data: the path and shape of every variable, named as Keras does."""

from collections.abc import Callable
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import keras
import numpy as np

Specs = list[tuple[str, tuple[int, ...]]]


def dense(layer: str, inputs: int, outputs: int) -> Specs:
    return [
        (f"{layer}/kernel", (inputs, outputs)),
        (f"{layer}/bias", (outputs,)),
    ]


def normalization(layer: str, size: int) -> Specs:
    return [(f"{layer}/gamma", (size,)), (f"{layer}/beta", (size,))]


def transformer_blocks(depth: int, width: int) -> Specs:
    specs = []
    for i in range(depth):
        specs += [
            *normalization(f"layer_normalization_{2 * i}", width),
            *dense(f"dense_{4 * i}", width, 3 * width),
            *dense(f"dense_{4 * i + 1}", width, width),
            *normalization(f"layer_normalization_{2 * i + 1}", width),
            *dense(f"dense_{4 * i + 2}", width, 4 * width),
            *dense(f"dense_{4 * i + 3}", 4 * width, width),
        ]
    return [*specs, *normalization(f"layer_normalization_{2 * depth}", width)]


def gpt2(depth: int = 12) -> Specs:
    """GPT-2 small: 124 million parameters in 148 variables."""
    return [
        ("embedding/embeddings", (50257, 768)),
        ("position_embedding/embeddings", (1024, 768)),
        *transformer_blocks(depth, 768),
    ]


def vit() -> Specs:
    """ViT-B/16: 87 million parameters in 152 variables."""
    return [
        ("class_token/bias", (768,)),
        ("position_embedding/embeddings", (197, 768)),
        ("conv2d/kernel", (16, 16, 3, 768)),
        ("conv2d/bias", (768,)),
        *transformer_blocks(12, 768),
        *dense("dense_48", 768, 1000),
    ]


def resnet50() -> Specs:
    """ResNet-50: 26 million parameters in 161 variables."""
    specs: Specs = []

    def convolution(window: int, inputs: int, outputs: int) -> None:
        i = len(specs) // 3
        specs.append((f"conv2d_{i}/kernel", (window, window, inputs, outputs)))
        specs.extend(normalization(f"batch_normalization_{i}", outputs))

    convolution(7, 3, 64)
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            convolution(1, inputs, width)
            convolution(3, width, width)
            convolution(1, width, 4 * width)
            if block == 0:
                convolution(1, inputs, 4 * width)
            inputs = 4 * width
    return [*specs, *dense("dense", inputs, 1000)]


def lstm_layer(layer: str, inputs: int, units: int) -> Specs:
    return [
        (f"{layer}/lstm_cell/kernel", (inputs, 4 * units)),
        (f"{layer}/lstm_cell/recurrent_kernel", (units, 4 * units)),
        (f"{layer}/lstm_cell/bias", (4 * units,)),
    ]


def lstm() -> Specs:
    """A language model of two layers: 20 million parameters in 9 variables."""
    return [
        ("embedding/embeddings", (10_000, 650)),
        *lstm_layer("lstm", 650, 650),
        *lstm_layer("lstm_1", 650, 650),
        *dense("dense", 650, 10_000),
    ]


def tiny() -> Specs:
    """One layer of each kind, to try a command."""
    return [
        ("embedding/embeddings", (100, 16)),
        ("conv2d/kernel", (3, 3, 4, 8)),
        *normalization("batch_normalization", 8),
        *lstm_layer("lstm", 8, 8),
        *dense("dense", 16, 32),
    ]


MODELS: dict[str, Callable[[], Specs]] = {
    "gpt2": gpt2,
    "gpt2_2": partial(gpt2, 2),
    "resnet50": resnet50,
    "vit": vit,
    "lstm": lstm,
    "tiny": tiny,
}

# The layer whose kernel has this rank, so that its axes are not ambiguous.
KERNEL_LAYERS = {2: "dense", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


def repeated(shape: Sequence[int], count: int) -> Specs:
    """Many variables of one shape, each in a layer of its own."""
    if len(shape) == 1:
        return [(f"dense_{i}/bias", tuple(shape)) for i in range(count)]
    layer = KERNEL_LAYERS[len(shape)]
    return [(f"{layer}_{i}/kernel", tuple(shape)) for i in range(count)]


def size(specs: Specs) -> int:
    """Number of parameters."""
    return sum(int(np.prod(shape)) for _, shape in specs)


def random_arrays(specs: Specs, scale: float, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        np.float32(scale) * rng.standard_normal(shape, np.float32)
        for _, shape in specs
    ]


def make_variables(specs: Specs, arrays: Sequence[Any]) -> list[Any]:
    """Keras variables with these paths and values."""
    variables = []
    for (path, _), array in zip(specs, arrays):
        *layers, name = path.split("/")
        with ExitStack() as scopes:
            for layer in layers:
                scopes.enter_context(keras.name_scope(layer))
            variables.append(keras.Variable(array, name=name))
    return variables
