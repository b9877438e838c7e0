"""Runs the update: one compiled function for all variables, on each replica.

In a graph on a CPU it may be two, the second for the first few variables.

The only file that knows TensorFlow or a private name of Keras.
"""

import math
import os
import platform
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_blockwise.entries import EntryUpdate
from keras_blockwise.entries import is_divided_unevenly
from keras_blockwise.entries import merging_axes
from keras_blockwise.entries import rows_of_each
from keras_blockwise.entries import smallest
from keras_blockwise.reduction import MANY

Tensor = Any
Variable = Any

# How many variables are worth a second call of a compiled function, which takes
# a tenth of a millisecond and some microseconds for every variable.
TWO_CALLS = 32
# So many vectors of fewer numbers than `SHORT` are worth an operation that
# joins them for the call.
JOINED = 16
SHORT = 4096

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.python import xla

    class StateDescription(tf.train.experimental.PythonState):
        """What a `tf.train.Checkpoint` says of the state of an optimizer.

        Otherwise it has positions and values alone. TensorFlow reads this
        before it assigns to any variable.
        """

        def __init__(self, optimizer: "FusedOptimizer") -> None:
            self.optimizer = optimizer

        def __repr__(self) -> str:
            name = type(self.optimizer).__name__
            return f"<description that is saved with the state of {name} alone>"

        def serialize(self) -> str:
            return self.optimizer.describe_state()

        def deserialize(self, string_value: bytes) -> None:
            self.optimizer.check_description(string_value.decode())


class FusedOptimizer(keras.optimizers.Optimizer):
    """An optimizer that updates all its variables in one function, or in two.

    A subclass has `update_all`, `variables_of`, `describe_state` and
    `check_description`, may have `first_and_rest`, and calls `add_slot` in its
    `build`.

    Args:
        learning_rate: As in `keras.optimizers.Optimizer`.
        jit_compile: Boolean or `"auto"`. Whether to compile the update with
            XLA. `"auto"` does so wherever the device can.
        skip_nonfinite: Boolean. Whether to leave out a step whose gradient has
            an infinity or a NaN.
        **kwargs: As in `keras.optimizers.Optimizer`.
    """

    def __init__(
        self,
        learning_rate: Any,
        jit_compile: bool | str = "auto",
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, **kwargs)
        self.jit_compile = jit_compile
        self.skip_nonfinite = skip_nonfinite
        self.skipped_steps: Variable | None = None
        if skip_nonfinite:
            self.skipped_steps = self.add_variable(
                shape=(),
                dtype="int",
                aggregation="only_first_replica",
                name="skipped_steps",
            )
        self._cache = Cache()
        if keras.backend.backend() == "tensorflow":
            self._state_description = StateDescription(self)

    def describe_state(self) -> str:
        """What to save in a checkpoint beside the state."""
        raise NotImplementedError

    def check_description(self, description: str) -> None:
        """Raises an error if the state of a checkpoint does not fit.

        Args:
            description: What `describe_state` returned for it.
        """
        raise NotImplementedError

    def update_all(
        self,
        variables: Any,
        gradients: Sequence[Tensor],
        learning_rate: Tensor,
        iterations: Tensor,
    ) -> Tensor:
        """Updates some variables and the slots that belong to them.

        Args:
            variables: `variables_of(indices)` as they are on this replica.
            gradients: One dense tensor per index.
            learning_rate: Scalar.
            iterations: Scalar, 0 on the first step.

        Returns:
            Whether the update took place: a boolean scalar.
        """
        raise NotImplementedError

    def variables_of(self, indices: Sequence[int]) -> Any:
        """All that `update_all` reads and writes, as a nest of variables.

        Args:
            indices: Positions of the variables, in the order of `build`.
        """
        raise NotImplementedError

    def first_and_rest(self, indices: Sequence[int]) -> list[slice]:
        """The first few of `indices` and the rest.

        `update_all` must be able to update each of the two by itself.

        Args:
            indices: Positions of the variables, in the order of `build`.

        Returns:
            Two slices, or one of all.
        """
        return [slice(None)]

    def add_slot(
        self,
        variable: Variable,
        name: str,
        shape: Sequence[int],
        dtype: str,
        value: float,
    ) -> Variable:
        """A state variable on the devices of `variable`."""
        arguments = {
            "shape": shape,
            "initializer": keras.initializers.Constant(value),
            "dtype": dtype,
            "name": name,
        }
        if keras.backend.backend() != "tensorflow":
            return self.add_variable(**arguments)
        extended = self._distribution_strategy.extended
        with extended.colocate_vars_with(native(variable)):
            return self.add_variable(**arguments)

    def has_no_update(self, variable: Variable) -> bool:
        """Whether Keras assigns its gradient to the variable, as in float8."""
        return bool(self._overwrite_variable_with_gradient(variable))

    def weight_decay_of(self, variable: Variable) -> float:
        """The decoupled weight decay of a variable."""
        if self.weight_decay is None or not self._use_weight_decay(variable):
            return 0.0
        return float(self.weight_decay)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: `update_all` does it in its own pass over the weights."""

    def apply(
        self, grads: Sequence[Tensor], trainable_variables: Any = None
    ) -> None:
        """Updates the variables; see `keras.optimizers.Optimizer.apply`.

        A sparse gradient means what its dense form means: repeated rows are
        added up before anything is clipped or squared.
        """
        if trainable_variables is None:
            variables = self._trainable_variables
        else:
            variables = trainable_variables = list(trainable_variables)
        if keras.backend.backend() == "tensorflow":
            grads = list(grads)
            for i, (gradient, variable) in enumerate(zip(grads, variables)):
                grads[i] = densify(gradient, variable)
        super().apply(grads, trainable_variables)

    def _backend_apply_gradients(
        self, grads: Any, trainable_variables: Any
    ) -> None:
        if self.skip_nonfinite:
            self._cache.skipped_before = keras.ops.copy(self.skipped_steps)
        # TensorFlow orders a graph by names. Named after "gradient_tape", where
        # Keras names it before, a step of an LSTM takes 2 % less on a CPU.
        with tf.name_scope("update/"):
            super()._backend_apply_gradients(grads, trainable_variables)

    def _update_model_variables_moving_average(
        self, trainable_variables: Any
    ) -> None:
        averages = self._model_variables_moving_average
        if not self.skip_nonfinite:
            super()._update_model_variables_moving_average(trainable_variables)
            return
        old = [a if a is None else keras.ops.copy(a) for a in averages]
        super()._update_model_variables_moving_average(trainable_variables)
        taken = keras.ops.equal(self.skipped_steps, self._cache.skipped_before)
        for average, value in zip(averages, old):
            if average is not None:
                average.assign(keras.ops.where(taken, average, value))

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

    def _clip_gradients(self, grads: Any) -> Any:
        clipped = super()._clip_gradients(grads)
        if self.skip_nonfinite and self.clipvalue:
            # An infinity must not pass as the largest value.
            clipped = [
                keras.ops.where(keras.ops.isfinite(g), c, g)
                for g, c in zip(grads, clipped)
            ]
        return clipped

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        indices = tuple(
            self._get_variable_index(v) for v in trainable_variables
        )
        if keras.backend.backend() != "tensorflow":
            variables = self._variables_of_step(indices)
            self._update(variables, grads, learning_rate, self.iterations)
            return
        grads = [
            tf.cast(g, v.dtype) for g, v in zip(grads, trainable_variables)
        ]
        for gradient, variable in zip(grads, trainable_variables):
            if not gradient.shape.is_fully_defined():
                # A graph does not always know it.
                gradient.set_shape(variable.shape)
        if self._distribution_strategy.num_replicas_in_sync > 1:
            pairs = self._all_reduce_sum_gradients(list(zip(grads, indices)))
            grads = [gradient for gradient, _ in pairs]

        def update_replicas(
            strategy: Any, grads: Sequence[Tensor], *scalars: Tensor
        ) -> None:
            for together in self._calls(indices):
                own = indices[together]
                if own not in self._cache.variables:
                    self._cache.variables[own] = tf.nest.map_structure(
                        native, self._variables_of_step(own)
                    )
                strategy.extended.update(
                    native(self._trainable_variables[own[0]]),
                    self._update_replica(own),
                    args=(
                        self._cache.variables[own],
                        grads[together],
                        *scalars,
                    ),
                    group=False,
                )

        tf.__internal__.distribute.interim.maybe_merge_call(
            update_replicas,
            self._distribution_strategy,
            grads,
            # One dtype for one compiled update, whatever a callable returns.
            tf.cast(learning_rate, keras.config.floatx()),
            tf.convert_to_tensor(self.iterations),
        )

    def _calls(self, indices: Sequence[int]) -> list[slice]:
        """What of `indices` to update together, in the order of the calls.

        In a graph, most variables can be updated while the gradients of the
        first layer are made, which are the last.
        """
        if (
            len(indices) < TWO_CALLS
            or self.skip_nonfinite  # It needs all gradients.
            or not self._in_graph_on_cpu()
        ):
            return [slice(None)]
        return self.first_and_rest(indices)[::-1]

    def _variables_of_step(self, indices: tuple[int, ...]) -> Any:
        counters = [self._iterations, self.skipped_steps]
        return self.variables_of(indices), counters[: 2 * self.skip_nonfinite]

    def _update(self, variables: Any, *tensors: Any) -> None:
        """`update_all`, and the count of the steps that were not taken."""
        variables, counters = variables
        taken = self.update_all(variables, *tensors)
        if counters:
            iterations, skipped_steps = counters
            skipped = 1 - keras.ops.cast(taken, skipped_steps.dtype)
            skipped_steps.assign_add(skipped)
            # As if the step had not been: Keras will add one.
            iterations.assign_sub(
                skipped * (self.gradient_accumulation_steps or 1)
            )

    def _update_replica(self, indices: tuple[int, ...]) -> Callable[..., None]:
        """`_update` on the variables of one replica, compiled."""

        def update(
            first_variable: Any,
            variables: Any,
            gradients: Sequence[Tensor],
            *scalars: Tensor,
        ) -> None:
            if not self._should_compile():
                self._update(variables, gradients, *scalars)
                return
            joined = short_vectors(gradients) if self._in_graph_on_cpu() else []
            tensors = (join(gradients, joined), *scalars)
            key = (indices, id(first_variable), bool(joined))
            if key not in self._cache.functions:
                sizes = [gradients[i].shape[0] for i in joined]
                self._cache.functions[key] = compile_update(
                    # The variables are captured: no work for them per step.
                    lambda tensors, *scalars: self._update(
                        variables, split(tensors, joined, sizes), *scalars
                    ),
                    tensors,
                )
            self._cache.functions[key](*tensors)

        return update

    def new_values(self, updates: Sequence[EntryUpdate]) -> list[list[Tensor]]:
        """What the variables of each update are to be, in a shape of theirs."""
        if not self._compiles_for_cpu():
            return [list(u.function(*u.inputs, *u.values)) for u in updates]
        cores = tf.config.threading.get_intra_op_parallelism_threads()
        cores = cores or os.cpu_count() or 1
        rows = rows_of_each(updates, cores)
        new: list[list[Tensor]] = []
        loops = []
        for i, update in enumerate(updates):
            if i in rows:
                values, state = new_values_in_rows(update, rows[i])
                loops.append(state)
            else:
                values = new_values_in_place(update, cores)
            new.append(values)
        if loops:
            last = new[smallest(updates)]
            last[0] = after(tf.add_n(loops), last[0])
        return new

    def materializer(self) -> Callable[[Tensor], Tensor] | None:
        """What keeps XLA from joining what makes a tensor with what takes it.

        `None` where joining is right: on a GPU, on a TPU, and without XLA.
        """
        if not self._compiles_for_cpu():
            return None
        return lambda tensor: xla.optimization_barrier(tensor)[0]

    def _in_graph_on_cpu(self) -> bool:
        """Whether the compiled update is a node of a graph on a CPU."""
        return (
            not tf.executing_eagerly()
            and tf.__internal__.get_enclosing_xla_context() is None
            and self._compiles_for_cpu()
        )

    def _compiles_for_cpu(self) -> bool:
        return (
            keras.backend.backend() == "tensorflow"
            and self._should_compile()
            and on_cpu(self._trainable_variables)
        )

    def _should_compile(self) -> bool:
        if self.jit_compile != "auto":
            return bool(self.jit_compile)
        if isinstance(self._distribution_strategy, tf.distribute.TPUStrategy):
            return False  # The strategy compiles the whole step.
        metal = platform.system() == "Darwin" and platform.machine() == "arm64"
        return not (metal and tf.config.list_physical_devices("GPU"))


class Cache:
    """What the first step made for those after it.

    A plain object, so that neither Keras nor a checkpoint looks inside.
    """

    def __init__(self) -> None:
        self.variables: dict[Any, Any] = {}
        self.functions: dict[Any, Any] = {}
        self.skipped_before: Any = None


def short_vectors(tensors: Sequence[Tensor]) -> list[int]:
    """The positions of the short vectors, if there are enough to join them.

    An argument of a compiled function takes as long as an operation. With one
    for all vectors, `model.fit` of a small transformer takes 2 to 4 % less.
    """
    positions = [
        i
        for i, tensor in enumerate(tensors)
        if tensor.shape.rank == 1
        and tensor.shape[0] < SHORT
        and tensor.dtype == tensors[0].dtype
    ]
    return positions if len(positions) >= JOINED else []


def join(tensors: Sequence[Tensor], positions: Sequence[int]) -> list[Tensor]:
    """The tensors, those vectors at the end and in one."""
    if not positions:
        return list(tensors)
    others = [t for i, t in enumerate(tensors) if i not in positions]
    return [*others, tf.concat([tensors[i] for i in positions], axis=0)]


def split(
    tensors: Sequence[Tensor], positions: Sequence[int], sizes: Sequence[int]
) -> list[Tensor]:
    """What was given to `join`."""
    if not positions:
        return list(tensors)
    *parts, joined = tensors
    for position, part in zip(positions, tf.split(joined, sizes)):
        parts.insert(position, part)
    return parts


def compile_update(update: Callable[..., None], tensors: Any) -> Any:
    """`update` compiled by XLA, once for all values of its arguments."""
    specs = tf.nest.map_structure(
        lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), tensors
    )
    with tf.init_scope():
        function = tf.function(update, jit_compile=True, autograph=False)
        return function.get_concrete_function(*specs)


def new_values_in_place(update: EntryUpdate, cores: int) -> list[Tensor]:
    """The new values of the variables, none of which needs other memory.

    XLA would make a copy of a momentum in 16 bits, which the weights need as it
    was before; and if every entry is a block, it would write the scaled
    gradient, which weights and momentum need, and read it twice. So each
    variable comes after those before it.
    """
    (*inputs, gradient), values = update.inputs, list(update.values)
    in_parts = is_divided_unevenly(update, cores)
    wide = all(value.dtype.size > 2 for value in values)
    if len(values) < 3 and wide and not in_parts:
        return list(update.function(*update.inputs, *values))
    new = []
    for i, value in enumerate(values):
        if in_parts:
            computed = in_two_parts(update, gradient, i)
        else:
            computed = update.function(*inputs, gradient, *values)[i]
        new.append(tf.cast(computed, value.dtype))
        gradient = after(new[i], gradient)
    return new


def in_two_parts(update: EntryUpdate, gradient: Tensor, i: int) -> Tensor:
    """The new value of one of some vectors, in place: its last entry by itself.

    XLA does not divide among cores what writes a part of a variable.
    """
    tensors = [*update.inputs[:-1], gradient, *update.values]
    position = len(update.inputs) + i
    n = max(update.shape)
    for first, size in ((0, n - 1), (n - 1, 1)):
        start = [first if m == n else 0 for m in update.shape]
        sizes = [min(m, size) for m in update.shape]
        part = [
            x if max(x.shape) == 1 else xla.dynamic_slice(x, start, sizes)
            for x in tensors
        ]
        tensors[position] = xla.dynamic_update_slice(
            tensors[position], update.function(*part)[i], start
        )
    return tensors[position]


def new_values_in_rows(
    update: EntryUpdate, rows: int
) -> tuple[list[Tensor], Tensor]:
    """The new values of the variables, made row by row, and a number.

    XLA runs loops side by side if none writes to the memory of another. So this
    one has all that it computes in its state, and the number is made of that:
    if it is read after all loops, the memory is no other's before.
    """
    inputs = [cut(x, rows, update) for x in update.inputs]
    values = [cut(v, rows, update) for v in update.values]

    def update_row(row: Tensor, _: Tensor, __: Tensor, values: Any) -> Any:
        index, values = tf.cast(row, tf.int32), list(values)
        entries = [at(x, index) for x in (*inputs, *values)]
        for i, value in enumerate(values):
            values[i] = xla.dynamic_update_slice(
                value,
                update.function(*entries)[i],
                [index] + [0] * (value.shape.rank - 1),
            )
            written = at(values[i], index)
            if i + 1 < len(values):
                # XLA writes in place what nobody reads afterwards.
                index = after(written, index)
                entries[len(inputs) + i + 1] = at(values[i + 1], index)
        # A quotient, since XLA would make a sum twice, and the row a copy.
        following = (row + 1) / after(written, tf.ones_like(row))
        return following, following, following < rows, values

    start = tf.constant(0.0), tf.constant(-1.0), tf.constant(True)
    row, following, more, values = tf.while_loop(
        lambda row, _, more, values: more, update_row, (*start, values)
    )
    return list(values), row + following + tf.cast(more, row.dtype)


def cut(tensor: Tensor, rows: int, update: EntryUpdate) -> Tensor:
    """Rows of a tensor; one, if it has one entry along the axes to be cut."""
    axes = merging_axes(update)
    n = math.prod(tensor.shape[:axes])
    first = (rows, n // rows) if n > 1 else (1, 1)
    return tf.reshape(tensor, (*first, *tensor.shape[axes:]))


def at(tensor: Tensor, row: Tensor) -> Tensor:
    """A row of a tensor, or all of it if it has one."""
    if tensor.shape[0] == 1:
        return tensor
    # It keeps the axis, and XLA writes back a row of the same shape in place.
    return tf.gather(tensor, [row])


def after(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, which XLA believes to depend on `tensor`."""
    never = tf.reshape(tensor, [-1])[0] > np.inf
    return tf.where(never, tf.zeros_like(value), value)


def native(variable: Variable) -> Any:
    """The `tf.Variable` inside a `keras.Variable`."""
    if isinstance(variable, keras.Variable):
        return variable.value
    return variable


def read(variable: Variable) -> Tensor:
    """What a variable is now; `keras.ops` would read it only when it is used.

    The order of the reads is the order of the arguments of a compiled update.
    """
    if keras.backend.backend() == "tensorflow":
        return tf.convert_to_tensor(variable)
    return keras.ops.convert_to_tensor(variable)


def scheduled_with(value: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, for sums that a CPU is to make along with the momentum.

    XLA runs first what needs the first arguments only. It would make the sums
    of all gradients and then all momenta, when the gradients have left the
    cache. So the sums need `value`, that of a variable which stands next to the
    momentum.
    """
    few = math.prod(gradient.shape) <= MANY
    return gradient if few else after(value, gradient)


def on_cpu(variables: Sequence[Variable]) -> bool:
    """Whether variables are on a CPU, of which a strategy may have several."""
    devices = {tf.DeviceSpec.from_string(native(v).device) for v in variables}
    return {device.device_type for device in devices} == {"CPU"}


def densify(gradient: Any, variable: Variable) -> Any:
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    return tf.math.unsorted_segment_sum(
        gradient.values, gradient.indices, variable.shape[0]
    )
