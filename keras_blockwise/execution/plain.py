"""The plain path: how JAX and PyTorch update. Read it first.

Sums are sums, and units are updated one after the other, as `algorithm` says.
The trainer of the backend compiles all of it, or the user's own `jit`.
TensorFlow uses these kernels on accelerators.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_blockwise.algorithm.blocks import block_sum
from keras_blockwise.algorithm.orthogonal import MatrixFunction
from keras_blockwise.algorithm.orthogonal import together
from keras_blockwise.algorithm.second_moment import Tensors
from keras_blockwise.algorithm.units import BlockUpdate
from keras_blockwise.algorithm.units import EntryUpdate
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.execution.hooks import KerasHooks
from keras_blockwise.execution.hooks import scalars_of

Tensor = Any
Variable = Any


class PlainKernels:
    """How to compute a step; every method is the simplest that is right."""

    def block_sums(
        self,
        averaged: Callable[[Tensor], Tensors],
        g: Tensor,
        w: Tensor,
        partition: Partition,
    ) -> Tensors:
        """The sums of `averaged(g)` over each block."""
        return tuple(block_sum(x, partition) for x in averaged(g))

    def of_matrices(
        self, function: MatrixFunction, xs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The function of matrices of one shape: all in one product.

        Not exact: accelerators may round what they multiply.
        """
        return together(lambda x: function(x, False), xs)

    def run(
        self, blocks: Sequence[BlockUpdate], entries: Sequence[EntryUpdate]
    ) -> tuple[list[Tensors], Iterator[Tensors]]:
        """What is new for each unit of `blocks`, and for each of `entries`.

        The latter is computed when it is asked for, so that a unit has been
        written before the next one takes memory.
        """
        statistics = []
        step_sizes: dict[int, Tensor] = {}
        for block in blocks:
            step_size, *new = block.function(block.means, *block.statistics)
            step_sizes |= block.by_position(step_size)
            statistics.append(tuple(new))
        return statistics, (new_values(entry, step_sizes) for entry in entries)

    def calls(self, accumulators: Sequence[Any]) -> list[slice]:
        """Which variables to update in one call after the other: all in one.

        Args:
            accumulators: What the accumulator of each variable is known by.
        """
        return [slice(None)]

    def pack(
        self, gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], list[Tensor]]]:
        """The arguments of a call, and a function that undoes it: as is."""
        return list(gradients), list


def new_values(entry: EntryUpdate, step_sizes: dict[int, Tensor]) -> Tensors:
    """What is to be kept of the entries of a unit."""
    new = entry.function(*entry.arguments(step_sizes))
    if entry.encoding is None:
        return new
    w, m = new
    return w, *entry.encoding.encode(m)


class PlainOptimizer(KerasHooks):
    """Keras's hooks on JAX and PyTorch."""

    kernels = PlainKernels()

    def update_together(
        self,
        indices: tuple[int, ...],
        gradients: Sequence[Tensor],
        learning_rate: Tensor,
    ) -> None:
        """A step of the variables at some positions."""
        batch, counters = self._batch(indices)
        taken = self._update(
            batch,
            [ops.stop_gradient(g) for g in gradients],
            scalars_of(self, learning_rate),
            self.kernels,
            # PyTorch would else record the step.
            lambda variable: ops.stop_gradient(ops.convert_to_tensor(variable)),
        )
        self._count(counters, taken)

    def add_slot(
        self,
        variable: Variable,
        name: str,
        shape: Shape,
        dtype: str,
        value: float,
    ) -> Variable:
        """A state variable on the devices of `variable`."""
        return self.add_variable(
            shape=shape,
            initializer=keras.initializers.Constant(value),
            dtype=dtype,
            name=name,
            layout=slot_layout(variable, shape),
        )

    def check_restored(self) -> None:
        """Nothing: no other backend has checkpoints by position."""

    def place_of(self, variable: Variable) -> Any:
        """Its own, if devices have different parts of a variable."""
        layout = tensor_layout(variable)
        sharded = layout is not None and any(layout.axes)
        return id(variable) if sharded else None

    def densify(self, gradient: Any, variable: Variable) -> Any:
        """A dense gradient: what JAX and PyTorch call sparse is one, too."""
        if hasattr(gradient, "todense"):
            return gradient.todense()
        if getattr(gradient, "is_sparse", False):
            return gradient.to_dense()
        return gradient

    def _backend_apply_gradients(
        self, grads: Any, trainable_variables: Any
    ) -> None:
        if not (self.skip_nonfinite and self.ema_overwrite_frequency):
            super()._backend_apply_gradients(grads, trainable_variables)
            return
        # On JAX, Keras overwrites weights although there is no average yet.
        before = [
            ops.copy(ops.convert_to_tensor(v))
            for v in self._trainable_variables
        ]
        super()._backend_apply_gradients(grads, trainable_variables)
        none_taken = ops.less(self.iterations, 0)
        for variable, value in zip(self._trainable_variables, before):
            new = ops.convert_to_tensor(variable)
            variable.assign(ops.where(none_taken, value, new))

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: Any
    ) -> None:
        # Before the first step that is taken there is no average, and the one
        # after it is the weights.
        some = ops.greater(self.iterations, 0)
        for variable, average in zip(
            trainable_variables, self._model_variables_moving_average
        ):
            if average is not None:
                # A new array: JAX would donate one of two variables twice.
                variable.assign(
                    ops.where(
                        some,
                        ops.convert_to_tensor(average),
                        ops.convert_to_tensor(variable),
                    )
                )


def slot_layout(variable: Variable, shape: Shape) -> Any:
    """The layout of the variable, on the axes where the slot has all entries.

    `None` if the variable has none. A slot without a layout of its own would
    get one by its path, which a pattern may match.
    """
    layout = tensor_layout(variable)
    if layout is None:
        return None
    axes = [None] * len(shape)
    if len(shape) == len(variable.shape):
        axes = [
            axis if n == size else None
            for axis, n, size in zip(layout.axes, shape, variable.shape)
        ]
    return keras.distribution.TensorLayout(axes, layout.device_mesh)


def tensor_layout(variable: Variable) -> Any:
    """What `keras.distribution` says of a variable, or `None`."""
    layout = getattr(variable, "_layout", None)
    if isinstance(layout, keras.distribution.TensorLayout):
        return layout
    return None
