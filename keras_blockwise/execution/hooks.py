"""What every backend overrides in a Keras optimizer: its private hooks."""

import itertools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

from keras_blockwise.algorithm.rule import Kernels
from keras_blockwise.algorithm.units import Batch
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.execution.update import Read
from keras_blockwise.execution.update import update
from keras_blockwise.state.checks import check_distinct
from keras_blockwise.state.checks import check_gradient_shape
from keras_blockwise.state.checks import check_number_of_gradients
from keras_blockwise.state.checks import check_trainable
from keras_blockwise.state.storage import Storage

Tensor = Any
Variable = Any
# All that a step writes: the batch, and the counters of `skip_nonfinite`.
Written = tuple[Batch, list[Variable]]


class KerasHooks(keras.optimizers.Optimizer):
    """A Keras optimizer that updates all of its variables together.

    `plain` and `tensorflow` have the hooks that differ between backends. The
    arguments are those of `BlockwiseOptimizer`.
    """

    block_state: Storage
    undecayed_kinds: tuple[str, ...]
    densify: Callable[[Tensor, Variable], Tensor]
    update_together: Callable[[tuple[int, ...], Sequence[Tensor], Tensor], None]
    check_restored: Callable[[], None]

    def __init__(
        self,
        learning_rate: Any,
        jit_compile: bool | str,
        skip_nonfinite: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, **kwargs)
        self._names = {variable.name for variable in self.variables}
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
        # A factor of the learning rate for each variable, if there are any.
        self._multipliers: Variable | None = None
        # Kind and shape of what a checkpoint has for this optimizer once it
        # is built.
        self.restored_layout: list[tuple[str, Shape]] | None = None
        self._skipped_before: Tensor = None

    def add_variable(
        self,
        shape: Shape,
        initializer: Any = "zeros",
        dtype: str | None = None,
        aggregation: str = "none",
        layout: Any = None,
        name: str | None = None,
    ) -> Variable:
        """As in Keras, with a number at the end of a name that is taken.

        `.h5` files and state trees know a variable by its path.
        """
        if name is not None:
            numbered = (f"{name}_{i}" for i in itertools.count(1))
            names = itertools.chain([name], numbered)
            name = next(n for n in names if n not in self._names)
            self._names.add(name)
        return super().add_variable(
            shape, initializer, dtype, aggregation, layout, name
        )

    @contextmanager
    def whole_or_not_built(self) -> Iterator[None]:
        """Within it, an error of `build` leaves no variables behind."""
        before = self.variables
        try:
            yield
        except BaseException:
            for variable in self.variables[len(before) :]:
                self._untrack_variable(variable)
                self._names.discard(variable.name)
            self.built = False
            raise

    @property
    def base_kinds(self) -> dict[int, str]:
        """What each variable that Keras makes by itself is, by its `id`."""
        kinds = {
            "iteration": [self._iterations],
            "learning_rate": [self._learning_rate],
            "learning_rate_multipliers": [self._multipliers],
            "skipped_steps": [self.skipped_steps],
        }
        if hasattr(self, "_model_variables_moving_average"):
            kinds["average"] = self._model_variables_moving_average
        if hasattr(self, "_accumulated_gradients"):
            kinds["gradient_accumulator"] = self._accumulated_gradients
        return {id(v): kind for kind, own in kinds.items() for v in own}

    def has_no_update(self, variable: Variable) -> bool:
        """Whether Keras assigns its gradient to the variable, as in float8."""
        return bool(self._overwrite_variable_with_gradient(variable))

    def apply(
        self, grads: Sequence[Tensor], trainable_variables: Any = None
    ) -> None:
        """Updates the variables; see `keras.optimizers.Optimizer.apply`.

        A sparse gradient means what its dense form means: repeated rows are
        added up before anything is clipped or squared. So does one that
        broadcasts to its variable.

        Raises:
            ValueError: If a gradient does not fit its variable, or a variable
                is given twice.
        """
        self.check_restored()
        grads = list(grads)
        if trainable_variables is None:
            variables = self._trainable_variables
        else:
            variables = trainable_variables = list(trainable_variables)
            self.check_variables(variables)
            if grads:  # None at all is not a step.
                check_number_of_gradients(len(grads), len(variables))
        for i, (gradient, variable) in enumerate(zip(grads, variables)):
            if gradient is not None:
                grads[i] = broadcast(self.densify(gradient, variable), variable)
        super().apply(grads, trainable_variables)

    def update_step(
        self, gradient: Tensor, variable: Variable, learning_rate: Tensor
    ) -> None:
        """Raises an error: variables are updated together, by `apply`."""
        raise TypeError(
            f"{type(self).__name__} updates all variables together, and has "
            "no `update_step` for one. Call `apply(gradients, variables)`. "
            f"Received: variable {variable.name!r}."
        )

    def exclude_from_weight_decay(
        self, var_list: Any = None, var_names: Any = None
    ) -> None:
        """See `keras.optimizers.Optimizer`; only before `build`."""
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` must be called before the "
                "optimizer is built, which fixes its weight decay. Received: "
                f"var_list={var_list}, var_names={var_names}. Make a new "
                "optimizer."
            )
        super().exclude_from_weight_decay(var_list, var_names)

    def check_variables(self, variables: Sequence[Variable]) -> None:
        """Raises an error if one is there twice, or cannot be trained."""
        check_distinct(variables, map(self._var_key, variables))
        if not self.built:
            for variable in variables:
                if not self.has_no_update(variable):
                    check_trainable(variable)

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        indices = map(self._get_variable_index, trainable_variables)
        updates = {
            i: gradient
            for i, gradient in zip(indices, grads)
            if i not in self.block_state.empty
        }
        if updates:
            self.update_together(
                tuple(updates), list(updates.values()), learning_rate
            )

    def _weight_decay_of(self, index: int) -> float:
        """The weight decay of the variable at a position."""
        state = self.block_state
        row, variable = state.rows[index], state.variables[index]
        decays = row and row.kind not in self.undecayed_kinds
        if decays and self.weight_decay and self._use_weight_decay(variable):
            return float(self.weight_decay)
        return 0.0

    @property
    def _counters(self) -> list[Variable]:
        """What `_count` writes to; nothing unless steps may be left out."""
        counters = [self._iterations, self.skipped_steps]
        return counters if self.skip_nonfinite else []

    def _batch(self, indices: tuple[int, ...]) -> Written:
        """What a step of some variables writes."""
        state = self.block_state
        if indices not in state.batches:
            state.batches[indices] = state.batch(indices, self._weight_decay_of)
        return state.batches[indices], self._counters

    def _update(
        self,
        batch: Batch,
        gradients: Sequence[Tensor],
        scalars: Sequence[Tensor],
        kernels: Kernels,
        read: Read,
    ) -> Tensor:
        """`update`; returns whether the step was taken, if that is counted."""
        taken = update(
            self.block_state.rule,
            batch,
            gradients,
            *scalars,
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


def scalars_of(optimizer: KerasHooks, learning_rate: Tensor) -> list[Tensor]:
    """What all variables of a step share, in the order of `update`.

    Learning rate, count of steps, and multipliers if there are any.
    """
    scalars = [learning_rate, ops.convert_to_tensor(optimizer.iterations)]
    if optimizer._multipliers is not None:
        scalars.append(ops.convert_to_tensor(optimizer._multipliers))
    return scalars


def last_learning_rate(optimizer: KerasHooks) -> Tensor:
    """That of the last step, where a schedule says another for the next."""
    rate, schedules = optimizer._learning_rate, keras.optimizers.schedules
    if isinstance(rate, schedules.LearningRateSchedule):
        return rate(ops.convert_to_tensor(optimizer._iterations) - 1)
    return optimizer.learning_rate


def broadcast(gradient: Tensor, variable: Variable) -> Tensor:
    """A dense gradient in the shape of its variable.

    A graph may know its shape in part, or not at all: the rest is checked when
    the graph is run.
    """
    if not ops.is_tensor(gradient):
        gradient = ops.convert_to_tensor(gradient)
    if gradient.shape == variable.shape:
        return gradient
    if getattr(gradient.shape, "rank", 0) is not None:
        check_gradient_shape(tuple(gradient.shape), variable)
    return ops.broadcast_to(gradient, variable.shape)


def copy(variable: Variable) -> Tensor:
    """The value of a variable, which does not change with it."""
    return ops.copy(ops.convert_to_tensor(variable))
