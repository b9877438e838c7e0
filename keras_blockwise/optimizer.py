"""The base class of every optimizer: arguments, blocks, configuration."""

import inspect
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import keras
from keras import ops

from keras_blockwise.algorithm.matrix_moments import check_blocks
from keras_blockwise.algorithm.rule import Rule
from keras_blockwise.algorithm.step_sizes import StepSizes
from keras_blockwise.algorithm.step_sizes import step_sizes
from keras_blockwise.blocking.axes import path_of
from keras_blockwise.blocking.blocking import Blocking
from keras_blockwise.blocking.blocking import Row
from keras_blockwise.blocking.blocking import Tile
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.execution import Execution
from keras_blockwise.execution.hooks import last_learning_rate
from keras_blockwise.multipliers import Multipliers
from keras_blockwise.state import saving
from keras_blockwise.state.slots import ITEM_SIZES
from keras_blockwise.state.slots import Slot
from keras_blockwise.state.slots import plan_slots
from keras_blockwise.state.storage import Storage
from keras_blockwise.validation import check_choice
from keras_blockwise.validation import check_keras_numbers
from keras_blockwise.validation import check_learning_rate

Variable = Any

# Arguments that Keras reads in each step, and `jit_compile`, which we do.
SETTABLE = {
    "clipnorm",
    "clipvalue",
    "ema_momentum",
    "ema_overwrite_frequency",
    "global_clipnorm",
    "jit_compile",
    "learning_rate",
    "learning_rate_multipliers",
    "loss_scale_factor",
    "name",
}
# Arguments of which the constructor makes something.
USED_AT_ONCE = {"output_layer", "sgd_learning_rate", "skip_nonfinite", "value"}
NOT_SETTABLE = (
    "`learning_rate_multipliers` must be a mapping, and can be set on a built "
    "optimizer if its constructor was given one, such as `{{}}`. Received: "
    "learning_rate_multipliers={!r}."
)
NO_STATE_IN_H5 = (
    "An optimizer must be built before its weights are set. Received: one that "
    "is not, as always when Keras loads an `.h5` file. Build it, or save the "
    "model as `.keras`."
)


class BlockwiseOptimizer(Execution):
    """Base class of the optimizers with one adaptive step size per block.

    A subclass says in `rule` how the step is made, and has no arithmetic.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments that returns the value to use.
        blocking: A scheme, a tuple or a `Blocking`; see `Blocking`.
        momentum_dtype: The dtype of the momentum. Defaults to that of the
            variable.
        jit_compile: Boolean or `"auto"`. Whether to compile the update with
            XLA. `"auto"` does so where the device can and it pays: not for
            small variables in a graph that Keras does not compile, nor for
            the first steps that `apply` takes by itself.
        skip_nonfinite: Boolean. Whether to leave out a step whose gradient has
            an infinity or a NaN; see `BlockAdam`.
        stochastic_rounding: Boolean. Whether to round new weights of 16 bits
            up or down at random; see `BlockAdam`.
        learning_rate_multipliers: A mapping from the path of a variable, or a
            regular expression that matches the whole path, to a factor of its
            learning rate; see `BlockAdam`.
        **kwargs: As in `keras.optimizers.Optimizer`.
    """

    # Optimizers of one family have the same state, up to its blocks.
    state_family: str = ""
    # Kinds of variables (see `Axes`) that `weight_decay` leaves alone.
    undecayed_kinds: tuple[str, ...] = ()

    def __init__(
        self,
        learning_rate: Any,
        *,
        blocking: str | Tile | Blocking,
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        skip_nonfinite: bool = False,
        stochastic_rounding: bool = False,
        learning_rate_multipliers: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        check_methods(type(self))
        check_choice("skip_nonfinite", skip_nonfinite, (True, False))
        check_choice("stochastic_rounding", stochastic_rounding, (True, False))
        check_choice("jit_compile", jit_compile, (True, False, "auto"))
        check_choice("momentum_dtype", momentum_dtype, (None, *ITEM_SIZES))
        check_keras_numbers(kwargs)
        super().__init__(
            check_learning_rate(learning_rate),
            jit_compile,
            skip_nonfinite,
            **kwargs,
        )
        self.blocking: Any = blocking  # `__setattr__` makes a `Blocking`.
        self.momentum_dtype = momentum_dtype
        self.stochastic_rounding = stochastic_rounding
        self._storage: Storage | None = None
        self._fixed: frozenset[str] = frozenset()
        self._given = Multipliers.of(learning_rate_multipliers)

    def __setattr__(self, name: str, value: Any) -> None:
        state = vars(self)
        used = name in USED_AT_ONCE and name in state
        if used or name in state.get("_fixed", ()):
            raise AttributeError(
                f"`{name}` must be given to the constructor: "
                f"{type(self).__name__} has used it already. Received: "
                f"{name}={value!r}. Make a new optimizer; `convert_state` "
                "copies the state of this one."
            )
        if name == "blocking" and not isinstance(value, Blocking):
            value = Blocking(value)
        super().__setattr__(name, value)

    @property
    def learning_rate_multipliers(self) -> dict[str, float] | None:
        """Factors of the learning rate, by the keys that were given."""
        if self._given is None:
            return None
        if self._multipliers is None:
            return dict(self._given.factors)
        return self._given.with_values(self._multipliers.numpy())

    @learning_rate_multipliers.setter
    def learning_rate_multipliers(self, value: Mapping[str, float]) -> None:
        given = Multipliers.of(value)
        if self.built:
            if given is None or self._multipliers is None:
                raise ValueError(NOT_SETTABLE.format(value))
            given = given.with_keys_of(self._given, self.block_state.variables)
            self._multipliers.assign(given.values())
        self._given = given

    def rule(self) -> Rule:
        """How the step is made from the arguments of the constructor."""
        raise NotImplementedError

    @property
    def partitions(self) -> tuple[Partition | None, ...]:
        """The blocks of each variable, in the order given to `build`.

        `None` stands for a variable that has no update, such as the scales of
        a float8 layer.
        """
        return self.block_state.partitions

    @property
    def block_state(self) -> Storage:
        """The blocks and the state variables that belong to them."""
        if self._storage is None:
            raise ValueError(
                f"{type(self).__name__} must be built before it has blocks. "
                "Call `optimizer.build(model.trainable_variables)` first."
            )
        return self._storage

    def build(self, variables: Sequence[Variable]) -> None:
        """Chooses the blocks and creates the state of the optimizer.

        Args:
            variables: The trainable variables.

        Raises:
            ValueError: If the blocking does not fit the variables, or a
                checkpoint that the optimizer was restored from.
        """
        if self.built:
            return
        self.check_restored()
        if self.blocking.table is None:
            self._build(variables)
        else:
            with saving.no_obstacle(self):
                self._build(variables)

    def _build(self, variables: Sequence[Variable]) -> None:
        rows, slots = self.plan(variables)
        given = self._matched(variables, rows)
        if self.restored_layout is not None:
            saving.check_planned(self, variables, slots)
        with self.whole_or_not_built():
            if variables:  # Keras gives none when it loads an `.h5` file.
                super().build(variables)
                if given is not None:
                    self._given = given
                    self._multipliers = add_multipliers(self, given.values())
            self._storage = Storage(
                whole_rule(self), variables, rows, slots, self.add_slot
            )
        if self.built:
            self._fixed = fixed_arguments(type(self))

    def plan(
        self, variables: Sequence[Variable]
    ) -> tuple[list[Row | None], list[Slot]]:
        """What `build` would do: the blocks and the slots.

        Args:
            variables: The trainable variables.

        Returns:
            What the blocking says of each variable, `None` for one without an
            update, and the slots in saved order.
        """
        self.check_variables(variables)
        updated = [v for v in variables if not self.has_no_update(v)]
        rule = self.rule()
        check_has_momentum(rule, self.momentum_dtype)
        by_matrix = rule.matrix_function is not None
        resolved = iter(self.blocking.resolve(updated, by_matrix))
        rows = [
            None if self.has_no_update(v) else next(resolved) for v in variables
        ]
        rows = rows_for(rule, variables, rows)
        slots = plan_slots(
            rule,
            [keras.backend.standardize_dtype(v.dtype) for v in variables],
            [row and row.partition for row in rows],
            self.momentum_dtype,
            list(zip(map(self.place_of, variables), alone(rule, rows))),
        )
        return rows, slots

    def planned(
        self, variables: Sequence[Variable] | None
    ) -> tuple[Sequence[Variable], Sequence[Row | None], Sequence[Slot]]:
        """Variables, rows and slots as built, or as they would be built.

        Args:
            variables: The trainable variables; may be `None` if built.
        """
        if not self.built and variables is not None:
            return variables, *self.plan(variables)
        state = self.block_state
        return state.variables, state.rows, state.slots

    def planned_multipliers(
        self, variables: Sequence[Variable], rows: Sequence[Row | None]
    ) -> list[float] | list[None]:
        """The factor of each variable as it is or will be built, if any."""
        if self._multipliers is not None:
            return [float(value) for value in self._multipliers.numpy()]
        given = None if self.built else self._matched(variables, rows)
        return [None] * len(variables) if given is None else given.values()

    def _matched(
        self, variables: Sequence[Variable], rows: Sequence[Row | None]
    ) -> Multipliers | None:
        if self._given is None or not variables:
            return None
        as_saved = self.blocking.table == tuple(row for row in rows if row)
        return self._given.matched(variables, as_saved)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor and the blocks, as plain data."""
        blocking, multipliers = self.blocking, self._given
        if multipliers is not None and self.learning_rate_multipliers:
            factors = self.learning_rate_multipliers
            multipliers = replace(multipliers, factors=factors)
        if self.built:
            table = tuple(row for row in self.block_state.rows if row)
            blocking = replace(blocking, table=table)
        return {
            **super().get_config(),
            "blocking": blocking.get_config(),
            "momentum_dtype": self.momentum_dtype,
            "jit_compile": self.jit_compile,
            "skip_nonfinite": self.skip_nonfinite,
            "stochastic_rounding": self.stochastic_rounding,
            "learning_rate_multipliers": multipliers
            and multipliers.get_config(),
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Any = None
    ) -> "BlockwiseOptimizer":
        config = dict(config)
        if isinstance(config.get("blocking"), Mapping):
            config["blocking"] = Blocking.from_config(config["blocking"])
        if "learning_rate_multipliers" in config:
            config["learning_rate_multipliers"] = Multipliers.from_config(
                config["learning_rate_multipliers"]
            )
        if isinstance(schedule := config.get("learning_rate"), dict):
            config["learning_rate"] = deserialized(schedule, custom_objects)
        optimizer: BlockwiseOptimizer
        optimizer = super().from_config(config, custom_objects)
        return optimizer

    def save_own_variables(self, store: Any) -> None:
        """Saves the state, each slot by itself, and the name of each."""
        saving.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Loads a saved state, once all of it is known to fit.

        Raises:
            ValueError: If the state is that of another optimizer, another
                blocking or other variables. None of it has been loaded then.
        """
        saved = {key: store[key] for key in store.keys()}
        if self.built and saved:
            with saving.no_obstacle(self):
                saving.load(self, saved)
        else:  # Warns if it has to skip some.
            saved.pop("names", None)
            super().load_own_variables(saved)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the state variables, in order: what Keras does with `.h5`."""
        if not self.built:
            with saving.no_obstacle(self):
                raise ValueError(NO_STATE_IN_H5)
        super().set_weights(weights)


def check_methods(cls: Any) -> None:
    """Raises an error if a subclass has a method that nobody would call."""
    if cls.update_step is not BlockwiseOptimizer.update_step:
        raise TypeError(
            f"{cls.__name__} must not have `update_step`, which is never "
            "called: all variables are updated together. Override `rule`, or "
            "`apply` to change the gradients."
        )
    if hasattr(cls, "get_gradients"):
        raise TypeError(
            f"{cls.__name__} must not have `get_gradients`, by which Keras 2 "
            "lets Horovod's `DistributedOptimizer` average the gradients, and "
            "which Keras 3 never calls: each worker would train alone. Take "
            f"the {cls.__name__} that is not wrapped, and average by "
            "`hvd.DistributedGradientTape` or "
            "`tf.distribute.MultiWorkerMirroredStrategy`."
        )


def whole_rule(optimizer: BlockwiseOptimizer) -> Rule:
    """The rule of an optimizer, with what all of them have."""
    return replace(
        optimizer.rule(), stochastic_rounding=optimizer.stochastic_rounding
    )


def alone(rule: Rule, rows: Sequence[Row | None]) -> list[int | None]:
    """The position of what has matrices: its state is kept by itself."""
    return [
        i if row and rule.matrices_of(row.partition, row.matrices) else None
        for i, row in enumerate(rows)
    ]


def check_has_momentum(rule: Rule, momentum_dtype: str | None) -> None:
    """Raises an error if there is nothing to keep in 8 bits."""
    if momentum_dtype == "int8" and not rule.momentum.has_state:
        raise ValueError(
            '`momentum_dtype="int8"` must be given to an optimizer with a '
            "momentum. Received: one without, which has none to keep in 8 "
            "bits. Leave out `momentum_dtype`."
        )


def rows_for(
    rule: Rule, variables: Sequence[Variable], rows: Sequence[Row | None]
) -> list[Row | None]:
    """The blocks of each variable, none of them shared if they have matrices.

    Raises:
        ValueError: If a block is too large to have a matrix.
    """
    if rule.matrix_moments is None:
        return list(rows)
    for variable, row in zip(variables, rows):
        if row is not None:
            check_blocks(path_of(variable), row.partition)
    return [row and row.alone() for row in rows]


def groups_of(optimizer: BlockwiseOptimizer) -> dict[str, list[Variable]]:
    """The variables of each key of the `learning_rate_multipliers`, if built.

    A variable belongs to one key at most.
    """
    given = optimizer._given or Multipliers({})
    groups: dict[str, list[Variable]] = {key: [] for key in given.factors}
    for key, variable in zip(given.keys or (), optimizer.block_state.variables):
        if key is not None:
            groups[key].append(variable)
    return groups


def last_step_sizes(optimizer: BlockwiseOptimizer) -> dict[int, StepSizes]:
    """The step sizes of the last step, by the position of the variable.

    Variables that are never updated have none.

    Args:
        optimizer: One that is built and has taken a step.
    """
    state = optimizer.block_state
    indices = updated_variables(optimizer)
    multipliers = optimizer._multipliers
    if multipliers is not None:
        multipliers = ops.take(ops.convert_to_tensor(multipliers), indices)
    found = step_sizes(
        state.rule,
        state.batch(indices, lambda index: 0.0),
        lambda part: part.value(ops.convert_to_tensor),
        ops.convert_to_tensor(last_learning_rate(optimizer)),
        ops.convert_to_tensor(optimizer.iterations),
        multipliers,
    )
    return {indices[position]: own for position, own in found.items()}


def updated_variables(optimizer: BlockwiseOptimizer) -> list[int]:
    """The positions of the variables that a step updates."""
    state = optimizer.block_state
    return [
        i
        for i, partition in enumerate(state.partitions)
        if partition is not None and i not in state.empty
    ]


def add_multipliers(
    optimizer: BlockwiseOptimizer, values: Sequence[float]
) -> Variable:
    """A variable of the optimizer with a number for each of its variables."""
    # Not assigned: in a graph, that would be done anew in each step.
    return optimizer.add_variable(
        shape=(len(values),),
        initializer=lambda shape, dtype: ops.convert_to_tensor(values, dtype),
        dtype="float32",
        aggregation="only_first_replica",
        name="learning_rate_multipliers",
    )


def deserialized(schedule: Mapping[str, Any], custom_objects: Any) -> Any:
    """The learning rate schedule with this config."""
    try:
        return keras.saving.deserialize_keras_object(schedule, custom_objects)
    except Exception as error:  # Of many kinds, in a damaged config.
        raise ValueError(
            "`learning_rate` must be a number or the config of a "
            f"`LearningRateSchedule` ({error}). Received: "
            f"learning_rate={schedule!r}."
        ) from error


def fixed_arguments(cls: type) -> frozenset[str]:
    """Arguments of the constructor that `build` makes something of."""
    names: set[str] = set()
    for base in map(vars, cls.__mro__):
        if "__init__" in base:
            names.update(inspect.signature(base["__init__"]).parameters)
    return frozenset(names - SETTABLE - {"self", "args", "kwargs"})
