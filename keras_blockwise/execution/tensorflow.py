"""TensorFlow: one compiled function for all variables, on each replica.

In a graph on a CPU it may be two, the second for the first few variables.
"""

import collections
import contextlib
import inspect
import math
import platform
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_blockwise.algorithm.units import Batch
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.execution.hooks import KerasHooks
from keras_blockwise.execution.hooks import Written
from keras_blockwise.execution.hooks import scalars_of
from keras_blockwise.execution.plain import PlainKernels
from keras_blockwise.execution.sharing import CompiledUpdate
from keras_blockwise.execution.sharing import Handle
from keras_blockwise.execution.sharing import compile_update
from keras_blockwise.execution.xla_cpu import XlaCpuKernels
from keras_blockwise.state import saving

Tensor = Any
Variable = Any

PLAIN = PlainKernels()
# What XLA compiles for a CPU.
FOR_CPU: PlainKernels = XlaCpuKernels()
# From so many steps of the same variables on, a step that `apply` takes by
# itself is worth compiling: all steps until then, compilation included, take as
# long as those of Keras's Adam (32 to 56, by `python -m benchmarks.compile`).
PLAIN_STEPS = 48
# From so many entries of a variable on, on average, an update in a graph on a
# CPU is worth compiling. Below, steps of `model.fit` take as long without, and
# the first one takes less (`python -m benchmarks.compile`).
LARGE = 2**15
# What a compiled update belongs to: the positions of its variables, and the
# first of them on its replica.
Replica = tuple[tuple[int, ...], int]


class TensorFlowOptimizer(KerasHooks):
    """Keras's hooks on TensorFlow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_strategy(type(self).__name__)
        super().__init__(*args, **kwargs)
        self._compiled = CompiledUpdates()
        self._state_description = StateDescription(self)

    def build(self, variables: Any) -> None:
        check_strategy(type(self).__name__)
        super().build(variables)

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
            *scalars_of(
                self, tf.cast(learning_rate, self.block_state.widest_dtype)
            ),
        )

    def _update_replicas(
        self,
        strategy: Any,
        indices: tuple[int, ...],
        grads: Sequence[Tensor],
        *scalars: Tensor,
    ) -> None:
        """Updates the variables at `indices`, in one call or in several."""
        for together in self._calls(indices):
            own = tuple(indices[i] for i in together)
            gradients = [grads[i] for i in together]
            strategy.extended.update(
                native(self._trainable_variables[own[0]]),
                self._update_replica,
                args=(own, self._written(own), gradients, *scalars),
                group=False,
            )

    def _calls(self, indices: tuple[int, ...]) -> list[Sequence[int]]:
        """Positions of `indices`, those of each call."""
        if self.skip_nonfinite:  # It needs them all.
            return [range(len(indices))]
        if indices not in self._compiled.calls:
            self._compiled.calls[indices] = by_device(
                [self._device_of(i) for i in indices],
                self.block_state.accumulator_keys_of(indices),
            )
        calls = self._compiled.calls[indices]
        if not in_graph():
            return calls
        return [
            own[part] for own in calls for part in self._parts(indices, own)
        ]

    def _parts(
        self, indices: tuple[int, ...], own: Sequence[int]
    ) -> list[slice]:
        """How a graph cuts a call that updates some of `indices`."""
        members = [indices[i] for i in own]
        devices = {self._device_of(i) for i in members}
        if not self._should_compile(devices):
            return [slice(None)]
        keys = self.block_state.accumulator_keys_of(members)
        return kernels_on(devices).calls(keys)

    def _device_of(self, index: int) -> str:
        device: str = native(self._trainable_variables[index]).device
        return device

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
        *scalars: Tensor,
    ) -> None:
        """`_update` on the variables of one replica, compiled if it may be."""
        batch, counters = written
        replica = (indices, id(first_variable))
        if replica not in self._compiled.devices:
            self._compiled.devices[replica] = devices_of(batch)
        devices = self._compiled.devices[replica]
        if self._should_compile(devices, replica):
            taken = self._run_compiled(
                replica,
                devices,
                batch,
                gradients,
                scalars,
            )
        else:
            taken = self._update(
                batch,
                gradients,
                scalars,
                kernels=PLAIN,
                read=tf.convert_to_tensor,
            )
        self._count(counters, taken)

    def _run_compiled(
        self,
        replica: Replica,
        devices: set[str],
        batch: Batch,
        gradients: list[Tensor],
        scalars: tuple[Tensor, ...],
    ) -> Tensor:
        """`_update`, compiled by XLA and called where the variables are."""
        kernels = kernels_on(devices)
        arguments: list[Tensor] = gradients
        unpack: Callable[[Sequence[Tensor]], list[Tensor]] = list
        if in_graph():
            arguments, unpack = kernels.pack(gradients)
        key = (*replica, len(arguments))
        if key not in self._compiled.functions:
            self._compiled.functions[key] = compile_update(
                lambda batch, arguments, *scalars: self._update(
                    batch,
                    unpack(arguments),
                    scalars,
                    kernels=kernels,
                    read=Handle.read,
                ),
                batch,
                (arguments, *scalars),
            )
        with on_device(devices):
            return self._compiled.functions[key](arguments, *scalars)

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
        with (
            extended.colocate_vars_with(native(variable)),
            made_by_each_worker(extended),
        ):
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

    def place_of(self, variable: Variable) -> Any:
        """The device of a variable: what is kept together is on one."""
        return native(variable).device

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

    def _should_compile(
        self, devices: set[str], replica: Replica | None = None
    ) -> bool:
        """Whether XLA is to compile the update of variables on `devices`."""
        if len(devices) > 1:
            return False  # XLA compiles for one.
        if self.jit_compile != "auto":
            return bool(self.jit_compile)
        if isinstance(self._distribution_strategy, tf.distribute.TPUStrategy):
            return False  # The strategy compiles the whole step.
        metal = platform.system() == "Darwin" and platform.machine() == "arm64"
        if metal and tf.config.list_physical_devices("GPU"):
            return False
        if not tf.executing_eagerly():
            worth = self._compiled.worth(devices, self._trainable_variables)
            return worth and not (is_watched() or is_exported())
        steps = self._compiled.steps
        if steps[replica] < PLAIN_STEPS:
            steps[replica] += 1
        elif steps[replica] == PLAIN_STEPS and not is_watched():
            steps[replica] += 1
        return steps[replica] > PLAIN_STEPS


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


def check_strategy(name: str) -> None:
    """Raises an error where the variables of a model are on many servers."""
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            f"{name} must not be made or built under "
            "`ParameterServerStrategy`: it updates all variables together, and "
            f"servers would update each by itself. Received: {strategy!r}. "
            "Take `tf.distribute.MultiWorkerMirroredStrategy`."
        )


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
        self.calls: dict[tuple[int, ...], list[Sequence[int]]] = {}
        self.written: dict[tuple[int, ...], Written] = {}
        self.devices: dict[Replica, set[str]] = {}
        self.steps: collections.Counter[Replica | None] = collections.Counter()
        self.functions: dict[Any, CompiledUpdate] = {}
        self._mean_size = 0.0

    def worth(self, devices: set[str], variables: Sequence[Variable]) -> bool:
        """Whether a graph is worth what it takes to compile the update."""
        if not self._mean_size:
            sizes = [math.prod(variable.shape) for variable in variables]
            self._mean_size = sum(sizes) / len(sizes)
        large = self._mean_size >= LARGE
        return large or not are_cpus(devices) or not in_graph()


def in_graph() -> bool:
    """Whether a compiled update is a node of a graph that is not."""
    return (
        not tf.executing_eagerly()
        and tf.__internal__.get_enclosing_xla_context() is None
    )


def is_watched() -> bool:
    """Whether a debugger of TensorFlow adds operations, which XLA rejects."""
    with tf.Graph().as_default() as graph:
        tf.constant(0.0)
    return len(graph.get_operations()) > 1


def is_exported() -> bool:
    """Whether a graph is traced for a file: for specifications, not a call.

    A file is read where the operations that only XLA has may not exist, as in
    TFLite. TensorFlow tells a function neither, so this asks who calls.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_get_concrete_function_garbage_collected":
            given = frame.f_locals["args"], frame.f_locals["kwargs"]
            arguments = tf.nest.flatten(given)
            return not arguments or any(
                isinstance(argument, tf.TypeSpec) for argument in arguments
            )
        frame = frame.f_back
    return False


def native(variable: Variable) -> Any:
    """The `tf.Variable` inside a `keras.Variable`."""
    if isinstance(variable, keras.Variable):
        return variable.value
    return variable


def devices_of(batch: Batch) -> set[str]:
    """Where the variables and the state of a step are."""
    variables = (keras.Variable, tf.Variable)
    return {
        native(leaf).device
        for leaf in tf.nest.flatten(batch)
        if isinstance(leaf, variables)
    }


def kernels_on(devices: set[str]) -> PlainKernels:
    """How to compute what XLA compiles for these devices."""
    return FOR_CPU if are_cpus(devices) else PLAIN


def are_cpus(devices: set[str]) -> bool:
    types = {tf.DeviceSpec.from_string(d).device_type for d in devices}
    return types == {"CPU"}


@contextlib.contextmanager
def made_by_each_worker(extended: Any) -> Iterator[None]:
    """Within it, each worker makes the initial value of a variable itself.

    The first worker would send it to the others, which TensorFlow cannot do in
    every dtype (not int8, not bfloat16), and which a constant does not need.
    """
    number = getattr(extended, "_num_workers", None)
    if number is None:
        yield
        return
    extended._num_workers = 1
    try:
        yield
    finally:
        extended._num_workers = number


def by_device(
    devices: Sequence[str], accumulators: Sequence[Any]
) -> list[Sequence[int]]:
    """The positions on each device, or all if two share an accumulator.

    Args:
        devices: The device of each variable.
        accumulators: What the accumulator of each variable is known by.
    """
    if len(set(zip(devices, accumulators))) > len(set(accumulators)):
        return [range(len(devices))]
    positions: dict[str, list[int]] = {}
    for position, device in enumerate(devices):
        positions.setdefault(device, []).append(position)
    return list(positions.values())


def on_device(devices: set[str]) -> Any:
    """Has a function run on its device, whatever the scope around it says."""
    if tf.__internal__.get_enclosing_xla_context() is not None:
        return contextlib.nullcontext()
    (device,) = devices
    return tf.device(device)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a graph, made once unless shapes of arguments change."""
    graph: Callable[..., Any] = tf.function(
        function, autograph=False, reduce_retracing=True
    )
    return graph


def reading(
    function: Callable[..., Any], variables: Sequence[Variable]
) -> Callable[..., Any]:
    """The function, whose first argument is the values of variables.

    A graph reads them faster than one after the other is read for it.
    """
    return compiled(
        lambda *others: function(
            [tf.convert_to_tensor(native(v)) for v in variables], *others
        )
    )


def number_of_replicas(model: keras.Model) -> int:
    """How many copies of a model are trained together."""
    return int(model.distribute_strategy.num_replicas_in_sync)
