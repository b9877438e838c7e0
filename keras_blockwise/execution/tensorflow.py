"""TensorFlow: one compiled function for all variables, on each replica.

In a graph on a CPU it may be two, the second for the first few variables.
"""

import platform
from collections.abc import Callable
from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_blockwise.blocking.partition import Shape
from keras_blockwise.execution.hooks import KerasHooks
from keras_blockwise.execution.hooks import Written
from keras_blockwise.execution.plain import PlainKernels
from keras_blockwise.execution.xla_cpu import XlaCpuKernels
from keras_blockwise.state import saving

Tensor = Any
Variable = Any

PLAIN = PlainKernels()
# What XLA compiles for a CPU.
FOR_CPU: PlainKernels = XlaCpuKernels()


class TensorFlowOptimizer(KerasHooks):
    """Keras's hooks on TensorFlow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compiled = CompiledUpdates()
        self._state_description = StateDescription(self)

    def _backend_apply_gradients(
        self, grads: Any, trainable_variables: Any
    ) -> None:
        # TensorFlow orders a graph by names. Named after "gradient_tape", where
        # Keras names it before, a step of an LSTM takes 2 % less on a CPU.
        with tf.name_scope("update/"):
            super()._backend_apply_gradients(grads, trainable_variables)

    def update_together(
        self,
        indices: tuple[int, ...],
        gradients: Sequence[Tensor],
        learning_rate: Tensor,
    ) -> None:
        """A step of the variables at some positions."""
        grads = [
            tf.cast(g, self._trainable_variables[i].dtype)
            for i, g in zip(indices, gradients)
        ]
        if self._distribution_strategy.num_replicas_in_sync > 1:
            pairs = self._all_reduce_sum_gradients(list(zip(grads, indices)))
            grads = [gradient for gradient, _ in pairs]
        tf.__internal__.distribute.interim.maybe_merge_call(
            self._update_replicas,
            self._distribution_strategy,
            indices,
            grads,
            # One dtype for one compiled update, whatever a callable returns.
            tf.cast(learning_rate, self.block_state.widest_dtype),
            tf.convert_to_tensor(self.iterations),
        )

    def _update_replicas(
        self,
        strategy: Any,
        indices: tuple[int, ...],
        grads: Sequence[Tensor],
        *scalars: Tensor,
    ) -> None:
        """Updates the variables at `indices`, in one call or in several."""
        calls = [slice(None)]
        if not self.skip_nonfinite and self._in_graph():  # It needs them all.
            keys = self.block_state.accumulator_keys_of(indices)
            calls = self._kernels().calls(keys)
        for together in calls:
            own = indices[together]
            strategy.extended.update(
                native(self._trainable_variables[own[0]]),
                self._update_replica,
                args=(own, self._written(own), grads[together], *scalars),
                group=False,
            )

    def _written(self, indices: tuple[int, ...]) -> Written:
        """What a step writes, in TensorFlow's own variables."""
        if indices not in self._compiled.written:
            self._compiled.written[indices] = tf.nest.map_structure(
                native, self._batch(indices)
            )
        return self._compiled.written[indices]

    def _update_replica(
        self,
        first_variable: Any,
        indices: tuple[int, ...],
        written: Written,
        gradients: list[Tensor],
        learning_rate: Tensor,
        iterations: Tensor,
    ) -> None:
        """`_update` on the variables of one replica, compiled if it may be."""
        kernels = self._kernels()
        # The variables are captured: no work for them per step.
        update = partial(
            self._update, written, kernels=kernels, read=tf.convert_to_tensor
        )
        if not self._should_compile():
            update(gradients, learning_rate, iterations)
            return
        arguments, unpack = gradients, None
        if self._in_graph():
            arguments, unpack = kernels.pack(gradients)
        key = (indices, id(first_variable), len(arguments))
        if key not in self._compiled.functions:
            self._compiled.functions[key] = compile_update(
                lambda arguments, *scalars: update(
                    unpack(arguments) if unpack else arguments, *scalars
                ),
                (arguments, learning_rate, iterations),
            )
        self._compiled.functions[key](arguments, learning_rate, iterations)

    def add_slot(
        self,
        variable: Variable,
        name: str,
        shape: Shape,
        dtype: str,
        value: float,
    ) -> Variable:
        """A state variable on the devices of `variable`."""
        extended = self._distribution_strategy.extended
        with extended.colocate_vars_with(native(variable)):
            return self.add_variable(
                shape=shape,
                initializer=keras.initializers.Constant(value),
                dtype=dtype,
                name=name,
            )

    def check_restored(self) -> None:
        """Raises an error if a checkpoint had another optimizer for this one.

        TensorFlow takes from it what has the same position.
        """
        description = self._state_description
        if restored_at(self) > restored_at(description):
            raise ValueError(saving.foreign_checkpoint(self))

    def is_sharded(self, variable: Variable) -> bool:
        """Whether devices have different parts of a variable: none has."""
        return False

    def densify(self, gradient: Any, variable: Variable) -> Any:
        """A dense gradient: rows that are repeated are added up."""
        if not isinstance(gradient, tf.IndexedSlices):
            return gradient
        return tf.math.unsorted_segment_sum(
            gradient.values, gradient.indices, variable.shape[0]
        )

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: Any
    ) -> None:
        overwrite = super()._overwrite_model_variables_with_average_value
        if not self.skip_nonfinite:
            overwrite(trainable_variables)
            return
        # Before the first step that is taken there is no average, and the one
        # after it is the weights.
        keras.ops.cond(
            keras.ops.greater(self.iterations, 0),
            lambda: overwrite(trainable_variables),
            lambda: None,
        )

    def _trackable_children(
        self, save_type: str = "checkpoint", **kwargs: Any
    ) -> dict[str, Any]:
        children: dict[str, Any]
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel":  # It would warn that it has no place.
            children.pop("_state_description", None)
        return children

    def _kernels(self) -> PlainKernels:
        if self._should_compile() and on_cpu(self._trainable_variables):
            return FOR_CPU
        return PLAIN

    def _should_compile(self) -> bool:
        if self.jit_compile != "auto":
            return bool(self.jit_compile)
        if isinstance(self._distribution_strategy, tf.distribute.TPUStrategy):
            return False  # The strategy compiles the whole step.
        metal = platform.system() == "Darwin" and platform.machine() == "arm64"
        return not (metal and tf.config.list_physical_devices("GPU"))

    @staticmethod
    def _in_graph() -> bool:
        """Whether a compiled update is a node of a graph that is not."""
        return (
            not tf.executing_eagerly()
            and tf.__internal__.get_enclosing_xla_context() is None
        )


class StateDescription(tf.train.experimental.PythonState):
    """What a `tf.train.Checkpoint` says of the state of an optimizer.

    Otherwise it has positions and values alone. TensorFlow reads this before it
    assigns to any variable.
    """

    def __init__(self, optimizer: TensorFlowOptimizer) -> None:
        self.optimizer = optimizer

    def __repr__(self) -> str:
        name = type(self.optimizer).__name__
        return f"<description that is saved with the state of {name} alone>"

    def serialize(self) -> str:
        return saving.describe(self.optimizer)

    def deserialize(self, string_value: bytes) -> None:
        received = saving.check_description(
            self.optimizer, string_value.decode()
        )
        if not self.optimizer.built:
            self.optimizer.restored_layout = received


def restored_at(trackable: Any) -> int:
    """The number of the last checkpoint that was restored into an object."""
    try:
        return int(trackable._update_uid)
    except AttributeError:  # TensorFlow has not looked at it yet.
        return -1


class CompiledUpdates:
    """What the first step made for those after it.

    A plain object, so that neither Keras nor a checkpoint looks inside.
    """

    def __init__(self) -> None:
        self.written: dict[tuple[int, ...], Written] = {}
        self.functions: dict[Any, Any] = {}


def compile_update(update: Callable[..., None], arguments: Any) -> Any:
    """`update` compiled by XLA, once for all values of its arguments."""
    specs = tf.nest.map_structure(
        lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), arguments
    )
    with tf.init_scope():
        function = tf.function(update, jit_compile=True, autograph=False)
        return function.get_concrete_function(*specs)


def native(variable: Variable) -> Any:
    """The `tf.Variable` inside a `keras.Variable`."""
    if isinstance(variable, keras.Variable):
        return variable.value
    return variable


def on_cpu(variables: Sequence[Variable]) -> bool:
    """Whether variables are on a CPU, of which a strategy may have several."""
    devices = {tf.DeviceSpec.from_string(native(v).device) for v in variables}
    return {device.device_type for device in devices} == {"CPU"}
