"""Compiles a TensorFlow function for a TPU, on a machine that has none.

    executable, memory = compile_for_tpu(training_step(model), (x, y))

The compiler is the one that a TPU uses, from `pip install 'jax[tpu]'`. JAX
only carries the program to it: TensorFlow exports the function, with the
variables that it captures as arguments, and JAX has a client of the compiler
that needs the name of a topology and no device.
"""

import functools
import os
from typing import Any
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Else the compiler asks the network which TPU this machine belongs to.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# Compiling takes no TPU away from others, so there is nothing to lock or log.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_LOG_DIR", "disabled")

import keras
import numpy as np
import tensorflow as tf
from jax.experimental import topologies
from jax.interpreters import mlir
from jaxlib import _jax
from jaxlib import xla_client
from jaxlib.mlir import ir


class Program(NamedTuple):
    """A function as TensorFlow gives it to XLA.

    Args:
        hlo: The serialized `HloModuleProto`.
        variables: For each parameter of the program, the `tf.Variable` that it
            holds, or `None` for an argument.
    """

    hlo: bytes
    variables: tuple[tf.Variable | None, ...]


def training_step(model: keras.Model) -> Any:
    """The step that `model.fit` compiles, as a function of `(x, y)`.

    It is the `one_step_on_data` of Keras's TensorFlow trainer, on one replica.
    """
    if hasattr(model.optimizer, "jit_compile"):
        # As under a `TPUStrategy`, which compiles the whole step, for a TPU.
        model.optimizer.jit_compile = False
    return tf.function(
        lambda data: model.distribute_strategy.run(
            model.train_step, args=(data,)
        ),
        reduce_retracing=True,
        jit_compile=True,
        autograph=False,
    )


def export(function: Any, *args: Any) -> Program:
    """What XLA is given when a `tf.function(jit_compile=True)` is called.

    In XLA for TensorFlow, a variable is one argument, and one more output if
    the function assigns to it. It aliases the two, so that the new value
    overwrites the old one (`alias_resource_update` in tf2xla). It does so here
    as on a TPU, the program says so in its `input_output_alias`, and nothing
    below changes that: no argument has to be donated by hand.
    """
    concrete = function.get_concrete_function(*args)
    by_handle = {id(v.handle): v for v in concrete.variables}
    captured = [by_handle.get(id(x)) for x in concrete.captured_inputs]
    num_arguments = len(concrete.inputs) - len(captured)
    compiler_ir = function.experimental_get_compiler_ir(*args)
    return Program(
        compiler_ir(stage="hlo_serialized"),
        (None,) * num_arguments + tuple(captured),
    )


def to_stablehlo(hlo: bytes) -> ir.Module:
    """A program as the compiler's client takes it."""
    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(hlo))
    # The exporter leaves copies in front of the results. They change nothing,
    # and StableHLO, which is all that the client takes, has no such operation.
    module.operation.walk(remove_copy)
    return module


def remove_copy(operation: ir.Operation) -> ir.WalkResult:
    if operation.name == "mhlo.copy":
        operation.result.replace_all_uses_with(operation.operands[0])
        operation.erase()
    return ir.WalkResult.ADVANCE


@functools.cache
def first_device(topology: str) -> Any:
    """Stands for one core of a TPU that is not there."""
    return topologies.get_topology_desc(topology, "tpu").devices[0]


def compile_program(module: ir.Module, topology: str = "v5e:2x2") -> Any:
    """The TPU executable of a StableHLO program, for one core."""
    device = first_device(topology)
    options = xla_client.CompileOptions()
    options.num_replicas = 1
    options.num_partitions = 1
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.array([[device.id]], "int32")
    )
    with module.context:
        return device.client.compile(
            module, xla_client.DeviceList((device,)), options
        )


def compile_for_tpu(
    function: Any, *args: Any, topology: str = "v5e:2x2"
) -> tuple[Any, Any]:
    """Compiles a function as a TPU would when it is called.

    Args:
        function: A `tf.function(jit_compile=True)`, such as `training_step`.
        *args: What to call it with; only shapes and dtypes matter.
        topology: Which TPU, in the words of JAX.

    Returns:
        The executable, and its memory statistics in bytes.
    """
    module = to_stablehlo(export(function, *args).hlo)
    executable = compile_program(module, topology)
    return executable, executable.get_compiled_memory_stats()
