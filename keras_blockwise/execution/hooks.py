"""What every backend overrides in a Keras optimizer: its private hooks."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_blockwise.algorithm.step import Kernels
from keras_blockwise.algorithm.units import Batch
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.execution.update import Read
from keras_blockwise.execution.update import update
from keras_blockwise.state.storage import Storage

Tensor = Any
Variable = Any
# All that a step writes: the batch, and the counters of `skip_nonfinite`.
Written = tuple[Batch, list[Variable]]


class KerasHooks(keras.optimizers.Optimizer):
    """A Keras optimizer that updates all of its variables together.

    `plain` and `tensorflow` have the hooks that differ between backends.

    Args:
        learning_rate: As in `keras.optimizers.Optimizer`.
        jit_compile: As in `BlockwiseOptimizer`.
        skip_nonfinite: As in `BlockwiseOptimizer`.
        **kwargs: As in `keras.optimizers.Optimizer`.
    """

    block_state: Storage
    undecayed_kinds: tuple[str, ...]
    densify: Callable[[Tensor, Variable], Tensor]

    def __init__(
        self,
        learning_rate: Any,
        jit_compile: bool | str,
        skip_nonfinite: bool,
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
        # Kind and shape of what a checkpoint has for this optimizer once it
        # is built.
        self.restored_layout: list[tuple[str, Shape]] | None = None
        self._skipped_before: Tensor = None

    def has_no_update(self, variable: Variable) -> bool:
        """Whether Keras assigns its gradient to the variable, as in float8."""
        return bool(self._overwrite_variable_with_gradient(variable))

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
        grads = list(grads)
        for i, (gradient, variable) in enumerate(zip(grads, variables)):
            grads[i] = self.densify(gradient, variable)
        super().apply(grads, trainable_variables)

    def _batch(self, indices: Sequence[int]) -> Written:
        """What a step of some variables writes."""
        state = self.block_state

        def weight_decay(i: int) -> float:
            row, variable = state.rows[i], state.variables[i]
            if (
                row is None
                or row.kind in self.undecayed_kinds
                or self.weight_decay is None
                or not self._use_weight_decay(variable)
            ):
                return 0.0
            return float(self.weight_decay)

        counters = [self._iterations, self.skipped_steps]
        batch = state.batch(indices, weight_decay)
        return batch, counters if self.skip_nonfinite else []

    def _update(
        self,
        batch: Batch,
        gradients: Sequence[Tensor],
        learning_rate: Tensor,
        iterations: Tensor,
        kernels: Kernels,
        read: Read,
    ) -> Tensor:
        """`update`; returns whether the step was taken, if that is counted."""
        taken = update(
            self.block_state.rule,
            batch,
            gradients,
            learning_rate,
            iterations,
            kernels=kernels,
            read=read,
            assign=self.assign,
            skip_nonfinite=self.skip_nonfinite,
        )
        return taken if self.skip_nonfinite else None

    def _count(self, counters: Sequence[Variable], taken: Tensor) -> None:
        """Counts a step that was not taken."""
        if counters:
            iteration, skipped_steps = counters
            skipped = 1 - ops.cast(taken, skipped_steps.dtype)
            skipped_steps.assign_add(skipped)
            # As if the step had not been: Keras will add one.
            iteration.assign_sub(
                skipped * (self.gradient_accumulation_steps or 1)
            )

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: the step does it in its own pass over the weights."""

    def _clip_gradients(self, grads: Any) -> Any:
        clipped = super()._clip_gradients(grads)
        if self.skip_nonfinite and self.clipvalue:
            # An infinity must not pass as the largest value.
            clipped = [
                ops.where(ops.isfinite(g), c, g) for g, c in zip(grads, clipped)
            ]
        return clipped

    def _backend_apply_gradients(
        self, grads: Any, trainable_variables: Any
    ) -> None:
        if self.skip_nonfinite:
            self._skipped_before = copy(self.skipped_steps)
        super()._backend_apply_gradients(grads, trainable_variables)

    def _update_model_variables_moving_average(
        self, trainable_variables: Any
    ) -> None:
        averages = self._model_variables_moving_average
        if not self.skip_nonfinite:
            super()._update_model_variables_moving_average(trainable_variables)
            return
        old = [
            average if average is None else copy(average)
            for average in averages
        ]
        super()._update_model_variables_moving_average(trainable_variables)
        taken = ops.equal(
            ops.convert_to_tensor(self.skipped_steps), self._skipped_before
        )
        for average, value in zip(averages, old):
            if average is not None:
                new = ops.convert_to_tensor(average)
                average.assign(ops.where(taken, new, value))


def copy(variable: Variable) -> Tensor:
    """The value of a variable, which does not change with it."""
    return ops.copy(ops.convert_to_tensor(variable))
