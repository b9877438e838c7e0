"""Training steps compiled for a TPU, and where their bytes are."""

import functools
import math
import re
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf
import tpu_compile
from jaxlib import xla_client

import keras_blockwise as kb

layers = keras.layers


def conv_net():
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    return model, (tf.zeros((32, 16, 16, 3)), tf.zeros((32,), tf.int32))


def transformer():
    width, vocabulary, length = 128, 256, 16
    tokens = keras.Input((length,), dtype="int32")
    x = layers.Embedding(vocabulary, width)(tokens)
    h = layers.LayerNormalization()(x)
    attention = layers.MultiHeadAttention(2, width // 2)
    x = x + attention(h, h, use_causal_mask=True)
    h = layers.LayerNormalization()(x)
    h = layers.Dense(4 * width, activation="gelu")(h)
    x = x + layers.Dense(width)(h)
    model = keras.Model(tokens, layers.Dense(vocabulary)(x))
    batch = tf.zeros((8, length), tf.int32)
    return model, (batch, batch)


MODELS = {"conv net": conv_net, "transformer": transformer}

# What the two models are trained with: model -> optimizer.
OPTIMIZERS = {
    "Adam": lambda model: keras.optimizers.Adam(),
    "BlockAdam": lambda model: kb.BlockAdam(),
    "BlockAdam amsgrad": lambda model: kb.BlockAdam(amsgrad=True),
    "BlockNadam": lambda model: kb.BlockNadam(),
    "BAGM": lambda model: kb.BAGM(),
    "BAGM polynomial": lambda model: kb.BAGM(accumulator="polynomial"),
    "BlockMuon": lambda model: kb.BlockMuon(
        blocking=kb.Blocking.from_model(model)
    ),
    "BAG": lambda model: kb.BAG(),
    "BlockRMSprop": lambda model: kb.BlockRMSprop(momentum=0.9, centered=True),
    "BCOS": lambda model: kb.BCOS(),
    "AdaBlock": lambda model: kb.AdaBlock(layers_per_step=2),
    "SPAM": lambda model: kb.SPAM(blocking="output_unit"),
    "AdamMini": lambda model: kb.AdamMini(
        blocking=kb.Blocking.from_model(model, "adam_mini")
    ),
    "Adalayer": lambda model: kb.Adalayer(
        blocking=kb.Blocking.from_model(model, "adalayer")
    ),
}


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter of a compiled program.

    Args:
        variable: The `tf.Variable` that it holds, or `None`.
        bytes: What its entries take.
        tiled_bytes: What it takes on the TPU.
        aliased: Whether the program writes a result over it.
    """

    variable: tf.Variable | None
    bytes: int
    tiled_bytes: int
    aliased: bool


class Compiled(NamedTuple):
    """A compiled training step.

    Args:
        model: The model that it trains.
        stablehlo: The program before it was compiled.
        text: The program after.
        memory: The compiler's statistics.
        parameters: What the program takes.
    """

    model: keras.Model
    stablehlo: str
    text: str
    memory: Any
    parameters: list[Parameter]

    def of(self, variables):
        """The parameters that hold certain Keras variables."""
        wanted = {id(v.value) for v in variables}
        return [p for p in self.parameters if id(p.variable) in wanted]

    def state(self, slot):
        """The parameters that hold one kind of optimizer state."""
        variables = self.model.optimizer.variables
        return self.of([v for v in variables if v.name.endswith(slot)])


TABLE: dict[tuple[str, str], Compiled] = {}


@functools.cache
def compile_optimizer(model_name, optimizer_name):
    """A training step with one of `OPTIMIZERS`."""
    model, data = MODELS[model_name]()
    optimizer = OPTIMIZERS[optimizer_name](model)
    return compile_step(model, data, optimizer, model_name, optimizer_name)


@functools.cache
def compile_scheme(model_name, scheme):
    """A training step with the blocks of a scheme."""
    defaults = {"output_unit": "BlockAdam", "adam_mini": "AdamMini"}
    if scheme in defaults:
        return compile_optimizer(model_name, defaults[scheme])
    model, data = MODELS[model_name]()
    optimizer = kb.BlockAdam(blocking=kb.Blocking.from_model(model, scheme))
    return compile_step(model, data, optimizer, model_name, scheme)


def compile_step(model, data, optimizer, model_name, label):
    """A training step; also a line of the table."""
    step = make_step(model, optimizer)
    compiled = compile_program(tpu_compile.export(step, data), model)
    TABLE[model_name, label] = compiled
    return compiled


def make_step(model, optimizer):
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return tpu_compile.training_step(model)


def compile_program(program, model=None):
    module = tpu_compile.to_stablehlo(program.hlo)
    return compile_module(module, program.variables, model)


def compile_module(module, variables, model=None):
    executable = tpu_compile.compile_program(module)
    (hlo,) = executable.hlo_modules()
    text = hlo.to_string()
    alias_table = text.partition("entry_computation_layout")[0]
    aliased = set(re.findall(r": \((\d+), {}, may-alias\)", alias_table))
    computation = xla_client.XlaComputation(
        hlo.as_serialized_hlo_module_proto()
    )
    shapes = computation.program_shape().parameter_shapes()
    parameters = [
        Parameter(
            variable,
            math.prod(shape.dimensions()) * shape.numpy_dtype().itemsize,
            tiled_bytes(shape),
            str(i) in aliased,
        )
        for i, (variable, shape) in enumerate(
            zip(variables, shapes, strict=True)
        )
    ]
    return Compiled(
        model,
        module.operation.get_asm(enable_debug_info=False),
        text,
        executable.get_compiled_memory_stats(),
        parameters,
    )


def tiled_bytes(shape):
    """What an array takes on a TPU.

    It is stored in tiles: of 8 x 128 entries for a float32 matrix, of fewer
    rows if it has fewer, of 128 entries for a vector or a scalar. Every axis
    is padded to whole tiles, so nothing takes less than 512 bytes, and ten
    columns are as many as 128 or, if the compiler turns the matrix, 16.
    """
    layout = shape.layout()
    sizes = [shape.dimensions()[a] for a in reversed(layout.minor_to_major())]
    tile = layout.tiling()[0]  # Others lie inside of it and only reorder.
    rank = max(len(sizes), len(tile))
    sizes = [1] * (rank - len(sizes)) + sizes
    tile = [1] * (rank - len(tile)) + list(tile)
    padded = [math.ceil(n / t) * t for n, t in zip(sizes, tile)]
    return math.prod(padded) * shape.numpy_dtype().itemsize


def total(parameters, attribute="tiled_bytes"):
    return sum(getattr(p, attribute) for p in parameters)


def table_lines():
    """The table of all that was compiled."""
    columns = ("weights", "state", "in tiles", "arguments", "aliased")
    columns += ("temporary", "code")
    yield f"{'':<32}" + "".join(f"{column:>11}" for column in columns)
    for (model_name, label), compiled in TABLE.items():
        model, memory = compiled.model, compiled.memory
        state = compiled.of(model.optimizer.variables)
        numbers = (
            total(compiled.of(model.trainable_variables), "bytes"),
            total(state, "bytes"),
            total(state),
            memory.argument_size_in_bytes,
            memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.generated_code_size_in_bytes,
        )
        row = "".join(f"{number:>11,}" for number in numbers)
        yield f"{model_name:<12} {label:<19}" + row
