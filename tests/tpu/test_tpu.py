"""The TPU compiler takes the whole training step, and updates it in place.

The step is that of one replica: what a `TPUStrategy` adds, the sum of the
gradients over its replicas, is not in it.
"""

import re

import keras
import programs
import pytest
import tensorflow as tf
import tpu_compile
from jax.errors import JaxRuntimeError
from jax.interpreters import mlir
from jaxlib.mlir import ir
from programs import MODELS
from programs import OPTIMIZERS
from programs import total

import keras_blockwise as kb
from keras_blockwise.blocking.schemes import SCHEMES

HOST_OPERATIONS = r" (infeed|outfeed|send|recv)(?:-start|-done)?\("
# Notes of the compiler to itself: 64-bit integers are made of two of 32, the
# indices of an embedding have been clamped, what is joined has a place.
COMPILER_CALLS = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    # The decomposition of a matrix, by the TPU itself.
    "Eigh",
    "EighTpu",
    "GatherScatterIndicesBitpacked",
    "X64Combine",
    "X64SplitHigh",
    "X64SplitLow",
}
# Schemes whose blocks of a convolution are the ones to look at.
OF_CONVOLUTIONS = ("filter", "input_unit", "adam_mini", "adablock")
# Schemes without a layer of their own in a model, where they are another one.
SAME_BLOCKS = {
    ("conv net", "head"): "output_unit",
    ("conv net", "adam_mini_short"): "adam_mini",
    ("transformer", "filter"): "output_unit",
}


def host_operations(compiled):
    """What in a program leaves the TPU, or may."""
    calls = set(re.findall(r'custom_call_target="([^"]*)"', compiled.text))
    calls |= set(re.findall(r"custom_call @(\w+)", compiled.stablehlo))
    operations = set(re.findall(HOST_OPERATIONS, compiled.text))
    return operations | calls - COMPILER_CALLS


def dynamic_shapes(compiled):
    """The types in a program with an axis of unknown size."""
    return re.findall(r"<[^<>]*\?", compiled.stablehlo)


def check(compiled):
    """All that holds of every training step."""
    model, memory = compiled.model, compiled.memory

    # All that the step assigns to is overwritten in place, and it assigns to
    # all but a constant learning rate.
    state = model.optimizer.variables
    variables = [*model.variables, *model.metrics_variables, *state]
    is_constant = isinstance(model.optimizer.learning_rate, keras.Variable)
    constants = [model.optimizer.learning_rate] if is_constant else []
    aliased = [p for p in compiled.parameters if p.aliased]
    owned = compiled.of(variables)
    read_only = compiled.of(constants)
    assert aliased == [p for p in owned if p not in read_only]
    assert len(owned) == len({id(v.value) for v in variables})
    assert memory.alias_size_in_bytes == total(owned) - total(read_only)

    # Beside that there is only the batch, and no byte that is not accounted
    # for by padding to tiles.
    batch = [p for p in compiled.parameters if p.variable is None]
    assert len(batch) == 2
    assert memory.argument_size_in_bytes == total(owned) + total(batch)

    assert not host_operations(compiled)
    assert not dynamic_shapes(compiled)
    # The partial sums of a CPU.
    assert "optimization_barrier" not in compiled.stablehlo


@pytest.mark.parametrize(
    "model, optimizer",
    [
        (model, optimizer)
        for model in MODELS
        for optimizer in OPTIMIZERS
        # A convolution differs in its matrices.
        if model == "transformer" or optimizer in ("AdaBlock", "BlockMuon")
    ],
)
def test_optimizer(model, optimizer):
    check(programs.compile_optimizer(model, optimizer))


@pytest.mark.parametrize(
    "model, scheme",
    [
        (model, scheme)
        for model in MODELS
        for scheme in SCHEMES
        if (model == "conv net") == (scheme in OF_CONVOLUTIONS)
    ],
)
def test_scheme(model, scheme):
    check(programs.compile_scheme(model, scheme))


@pytest.mark.parametrize("model, scheme", SAME_BLOCKS)
def test_scheme_without_a_layer_of_its_own(model, scheme):
    def partitions(scheme):
        network, _ = MODELS[model]()
        optimizer = kb.BlockAdam(
            blocking=kb.Blocking.from_model(network, scheme)
        )
        optimizer.build(network.trainable_variables)
        return optimizer.partitions

    assert partitions(scheme) == partitions(SAME_BLOCKS[model, scheme])


@pytest.mark.parametrize("model", MODELS)
def test_saves_the_second_moment_of_adam(model):
    adam = programs.compile_optimizer(model, "Adam")
    ours = programs.compile_optimizer(model, "BlockAdam")
    theirs = adam.state("velocity")
    assert len(theirs) == len(adam.model.trainable_variables)

    # Without padding, one number per output unit is left of each kernel.
    saved = total(theirs, "bytes") - total(ours.state("velocity"), "bytes")
    assert saved == total(adam.parameters, "bytes") - total(
        ours.parameters, "bytes"
    )
    # In tiles, what is left of a kernel is padded to a row of tiles, and where
    # Adam has no more than that, as for a bias, there is nothing to save but
    # what is kept together with others.
    states = [
        total(compiled.of(compiled.model.optimizer.variables))
        for compiled in (adam, ours)
    ]
    saved_in_tiles = states[0] - states[1]
    assert saved_in_tiles == (
        adam.memory.argument_size_in_bytes - ours.memory.argument_size_in_bytes
    )
    assert saved_in_tiles > 0.9 * total(theirs)


@pytest.mark.parametrize("model", MODELS)
def test_blocks_of_one_coordinate_take_what_adam_takes(model):
    adam = programs.compile_optimizer(model, "Adam").memory
    ours = programs.compile_scheme(model, "coordinate").memory
    assert ours.argument_size_in_bytes == adam.argument_size_in_bytes
    assert ours.alias_size_in_bytes == adam.alias_size_in_bytes


def test_other_options():
    model, data = programs.conv_net()
    optimizer = kb.BlockAdam(
        keras.optimizers.schedules.CosineDecay(1e-3, 100),
        weight_decay=0.01,
        global_clipnorm=1.0,
        use_ema=True,
        ema_overwrite_frequency=10,
        gradient_accumulation_steps=2,
        skip_nonfinite=True,
    )
    check(
        programs.compile_step(
            model, data, optimizer, "conv net", "BlockAdam, options"
        )
    )


def transformer_in(policy):
    keras.config.set_dtype_policy(policy)
    try:
        return programs.transformer()
    finally:
        keras.config.set_dtype_policy("float32")


def test_mixed_bfloat16():
    model, data = transformer_in("mixed_bfloat16")
    compiled = programs.compile_step(
        model,
        data,
        kb.BlockAdam(momentum_dtype="bfloat16"),
        "transformer",
        "BlockAdam, bfloat16",
    )
    check(compiled)
    wide = programs.compile_optimizer("transformer", "BlockAdam")
    momentum, halved = wide.state("momentum"), compiled.state("momentum")
    assert total(halved, "bytes") * 2 == total(momentum, "bytes")
    assert total(momentum) - total(halved) == (
        wide.memory.argument_size_in_bytes
        - compiled.memory.argument_size_in_bytes
    )


def test_momentum_of_8_bits_and_weights_of_16():
    model, data = transformer_in("bfloat16")
    optimizer = kb.BlockAdam(momentum_dtype="int8", stochastic_rounding=True)
    name = "BlockAdam, int8"
    compiled = programs.compile_step(
        model, data, optimizer, "transformer", name
    )
    check(compiled)
    wide = programs.compile_optimizer("transformer", "BlockAdam")
    momentum, codes = wide.state("momentum"), compiled.state("momentum")
    assert total(codes, "bytes") < 0.3 * total(momentum, "bytes")


def test_every_step_is_the_same_program():
    model, data = programs.conv_net()
    # No other accumulator depends as much on the number of the step.
    step = programs.make_step(model, kb.BAGM(accumulator="polynomial"))
    before = exported_text(step, data)
    traces = step.experimental_get_tracing_count()

    images, labels = data
    step((tf.random.normal(images.shape), labels + 1))
    model.optimizer.learning_rate = 0.5
    step((tf.random.normal(images.shape), labels + 2))

    assert model.optimizer.iterations == 2
    assert exported_text(step, data) == before
    assert step.experimental_get_tracing_count() == traces


def exported_text(step, data):
    module = tpu_compile.to_stablehlo(tpu_compile.export(step, data).hlo)
    return module.operation.get_asm(enable_debug_info=False)


def test_checks_see_the_host():
    program = """
        func.func @main(%x: tensor<8xf32>) -> tensor<8xf32> {
          %token = stablehlo.create_token : !stablehlo.token
          %sent = "stablehlo.outfeed"(%x, %token)
            : (tensor<8xf32>, !stablehlo.token) -> !stablehlo.token
          return %x : tensor<8xf32>
        }
    """
    assert host_operations(compile_text(program)) == {"outfeed"}


def test_compiler_refuses_a_callback():
    program = """
        func.func @main(%x: tensor<8xf32>) -> tensor<8xf32> {
          %y = stablehlo.custom_call @xla_python_callback(%x)
            : (tensor<8xf32>) -> tensor<8xf32>
          return %y : tensor<8xf32>
        }
    """
    with pytest.raises(JaxRuntimeError, match="xla_python_callback not found"):
        compile_text(program)


def compile_text(program):
    with mlir.make_ir_context():
        module = ir.Module.parse(program)
    return programs.compile_module(module, [None])


def test_checks_see_dynamic_shapes_and_variables_that_are_kept():
    written, kept = tf.Variable([1.0, 2.0]), tf.Variable([3.0])

    @tf.function(jit_compile=True)
    def step(x):
        positive = tf.boolean_mask(x, x > 0)
        written.assign(written * tf.reduce_sum(positive) + kept)

    compiled = programs.compile_program(
        tpu_compile.export(step, tf.constant([-1.0, 1.0, 2.0]))
    )
    assert dynamic_shapes(compiled)
    aliased = {p.variable.ref(): p.aliased for p in compiled.parameters[1:]}
    assert aliased == {written.ref(): True, kept.ref(): False}
    assert compiled.memory.alias_size_in_bytes == 512
