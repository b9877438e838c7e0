"""The Keras side of every optimizer: arguments, slots, config, loading."""

import dataclasses
import json
import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from functools import partial
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blockwise.axes import Weight
from keras_blockwise.blocking import Blocking
from keras_blockwise.blocking import Row
from keras_blockwise.blocking import Tile
from keras_blockwise.entries import EntryUpdate
from keras_blockwise.execution import FusedOptimizer
from keras_blockwise.execution import read
from keras_blockwise.partition import Partition
from keras_blockwise.partition import Shape
from keras_blockwise.reshaping import reshape
from keras_blockwise.state import ITEM_SIZES
from keras_blockwise.state import Group
from keras_blockwise.state import Slot
from keras_blockwise.state import State
from keras_blockwise.state import plan_slots
from keras_blockwise.step import Rule
from keras_blockwise.step import Scalars
from keras_blockwise.step import block_means
from keras_blockwise.step import block_step
from keras_blockwise.step import broadcastable
from keras_blockwise.step import entry_step

Tensor = Any
Variable = Any

# Kinds of the variables that an optimizer has before it is built.
INITIAL = {"iteration", "learning_rate", "skipped_steps"}
REMEDY = (
    "None of it was loaded. Compile the model with the optimizer and the "
    "blocking that were saved, or load the weights without the optimizer."
)


class Entry(NamedTuple):
    """A variable of an optimizer, as it is known in a saved state.

    Args:
        name: Its name.
        kind: What tells it from others: which slot of which weight.
        shape: Its shape.
    """

    name: str
    kind: str
    shape: Shape


class BlockwiseOptimizer(FusedOptimizer):
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
            XLA. `"auto"` does so wherever the device can.
        skip_nonfinite: Boolean. Whether to leave out a step whose gradient has
            an infinity or a NaN; see `BlockAdam`.
        **kwargs: As in `keras.optimizers.Optimizer`.
    """

    def __init__(
        self,
        learning_rate: Any,
        *,
        blocking: str | Tile | Blocking,
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("skip_nonfinite", skip_nonfinite, (True, False))
        check_choice("jit_compile", jit_compile, (True, False, "auto"))
        check_choice("momentum_dtype", momentum_dtype, (None, *ITEM_SIZES))
        super().__init__(
            check_learning_rate(learning_rate),
            jit_compile,
            skip_nonfinite,
            **kwargs,
        )
        if not isinstance(blocking, Blocking):
            blocking = Blocking(blocking)
        self.blocking = blocking
        self.momentum_dtype = momentum_dtype
        self._state: State | None = None
        # What a checkpoint has for this optimizer once it is built.
        self._restored: list[Any] | None = None

    # Optimizers of one family have the same state, up to its blocks.
    state_family: str = ""
    # Kinds of variables (see `Axes`) that `weight_decay` leaves alone.
    undecayed_kinds: tuple[str, ...] = ()

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
        rows, slots = self.plan(variables)
        if self._restored is not None:
            check_layout(self._planned_layout(variables, slots), self._restored)
        super().build(variables)
        slot_variables = [
            self.add_slot(variables[s.index], s.name, s.shape, s.dtype, s.value)
            for s in slots
        ]
        self._state = State(self.rule(), variables, rows, slots, slot_variables)

    def plan(
        self, variables: Sequence[Variable]
    ) -> tuple[list[Row | None], list[Slot]]:
        """What `build` would do: the blocks and state variables it needs.

        Args:
            variables: The trainable variables.

        Returns:
            What the blocking says of each variable, `None` for one without an
            update, and the state variables in saved order.
        """
        updated = [v for v in variables if not self.has_no_update(v)]
        resolved = iter(self.blocking.resolve(updated))
        rows = [
            None if self.has_no_update(v) else next(resolved) for v in variables
        ]
        slots = plan_slots(
            self.rule(),
            [keras.backend.standardize_dtype(v.dtype) for v in variables],
            [row and row.partition for row in rows],
            self.momentum_dtype,
        )
        return rows, slots

    def planned(
        self, variables: Sequence[Variable] | None
    ) -> tuple[Sequence[Variable], Sequence[Row | None], Sequence[Slot]]:
        """Variables, rows and slots as built, or as they would be built.

        Args:
            variables: The trainable variables; may be `None` if built.
        """
        if self._state is None and variables is not None:
            return variables, *self.plan(variables)
        state = self.block_state
        return state.variables, state.rows, state.slots

    def variables_of(self, indices: Sequence[int]) -> list[Group]:
        state = self.block_state

        def weight_decay(i: int) -> float:
            row = state.rows[i]
            if row is None or row.kind in self.undecayed_kinds:
                return 0.0
            return self.weight_decay_of(state.variables[i])

        return state.groups(indices, weight_decay)

    def update_all(
        self,
        groups: list[Group],
        gradients: Sequence[Tensor],
        learning_rate: Tensor,
        iterations: Tensor,
    ) -> Tensor:
        rule = self.block_state.rule
        # Float32 or wider: in bfloat16, a beta_2 of 0.999 is 1.
        dtypes = [
            keras.backend.standardize_dtype(group.statistics["velocity"].dtype)
            for group in groups
        ]
        materialize = self.materializer()
        means: Iterable[dict[str, Tensor]] = (
            block_means(
                rule,
                [
                    self.scheduled_with(
                        group.statistics["velocity"],
                        ops.cast(gradients[p], dtype),
                    )
                    for p in group.positions
                ],
                group.partitions,
                materialize,
            )
            for group, dtype in zip(groups, dtypes)
        )
        finite = True
        if self.skip_nonfinite:
            means = list(means)
            finite = ops.all(
                ops.stack([ops.all(ops.isfinite(m["velocity"])) for m in means])
            )
        scalars = {
            dtype: Scalars.of(
                rule,
                ops.cast(iterations, dtype) + 1,
                ops.cast(learning_rate, dtype),
            )
            for dtype in dict.fromkeys(dtypes)
        }
        updates = []
        statistics = []
        for group, dtype, group_means in zip(groups, dtypes, means):
            old = {
                name: ops.cast(v, dtype) for name, v in group.statistics.items()
            }
            scale, new = block_step(rule, scalars[dtype], group_means, old)
            if self.skip_nonfinite:
                new = {n: ops.where(finite, v, old[n]) for n, v in new.items()}
            statistics.append(new)
            for position, p, w, weight_decay, m in zip(
                group.positions,
                group.partitions,
                group.weights,
                group.weight_decays,
                group.moments,
            ):
                shape, entry_scale = broadcastable(scale, p)
                step = partial(entry_step, rule, scalars[dtype], weight_decay)
                # With the momentum of g, w needs only what m is to be; and XLA
                # would copy all of a variable that is stored in 16 bits.
                in_rows = (
                    m is not None
                    and not rule.momentum_of_gradient
                    and w.dtype == m.dtype == dtype
                )
                updates.append(
                    EntryUpdate(
                        partial(new_entries, step, dtype, finite),
                        shape,
                        (entry_scale, reshape(gradients[position], shape)),
                        tuple(
                            reshape(read(v), shape)
                            for v in ([w] if m is None else [w, m])
                        ),
                        in_rows,
                    )
                )
        new_values = iter(self.new_values(updates))
        for group, new in zip(groups, statistics):
            for variables in zip(group.weights, group.moments):
                for variable, value in zip(variables, next(new_values)):
                    self.assign(variable, reshape(value, variable.shape))
            for name, value in new.items():
                self.assign(group.statistics[name], value)
        return finite

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor and the blocks, as plain data."""
        blocking = self.blocking
        if self._state is not None:
            table = tuple(row for row in self._state.rows if row)
            blocking = dataclasses.replace(blocking, table=table)
        return {
            **super().get_config(),
            "blocking": blocking.get_config(),
            "momentum_dtype": self.momentum_dtype,
            "jit_compile": self.jit_compile,
            "skip_nonfinite": self.skip_nonfinite,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Any = None
    ) -> "BlockwiseOptimizer":
        config = dict(config)
        if isinstance(config.get("blocking"), Mapping):
            config["blocking"] = Blocking.from_config(config["blocking"])
        optimizer: BlockwiseOptimizer
        optimizer = super().from_config(config, custom_objects)
        return optimizer

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        # Keras saves by position alone; names make a mix-up detectable.
        kinds = [entry.kind for entry in self._layout()]
        names = json.dumps([type(self).__name__, *kinds])
        store["names"] = np.frombuffer(names.encode(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Loads a saved state, once all of it is known to fit.

        Raises:
            ValueError: If the state is that of another optimizer, another
                blocking or other variables. None of it has been loaded then.
        """
        saved = {key: store[key] for key in store.keys()}
        names = saved.pop("names", None)
        if not self.built or not saved:
            super().load_own_variables(saved)  # Warns if it has to skip some.
            return
        name, *kinds = ["another optimizer"] if names is None else decode(names)
        self._check_class(name)
        shapes = [tuple(saved[str(i)].shape) for i in range(len(kinds))]
        layout = self._layout()
        check_layout(layout, list(zip(kinds, shapes)))
        # Fewer than there are, if saved before the first step.
        variables = [
            variable
            for variable, entry in zip(self.variables, layout)
            if entry.kind in kinds
        ]
        for i, variable in enumerate(variables):
            variable.assign(saved[str(i)])

    def describe_state(self) -> str:
        layout = [(entry.kind, entry.shape) for entry in self._layout()]
        return json.dumps([type(self).__name__, layout])

    def check_description(self, description: str) -> None:
        name, layout = json.loads(description)
        self._check_class(name)
        received = [(kind, tuple(shape)) for kind, shape in layout]
        if self.built:
            check_layout(self._layout(), received)
        else:
            self._restored = received

    def _check_class(self, name: str) -> None:
        own_name = type(self).__name__
        if name != own_name:
            raise ValueError(
                f"The saved state must be one of {own_name}. Received: the "
                f"state of {name}. {REMEDY}"
            )

    def _layout(self) -> list[Entry]:
        """The variables of the optimizer, in saved order."""
        own = {} if self._state is None else self._state.slot_names
        return [
            Entry(
                variable.name,
                own.get(id(variable)) or base_slot_name(variable.name),
                tuple(variable.shape),
            )
            for variable in self.variables
        ]

    def _planned_layout(
        self, variables: Sequence[Variable], slots: Sequence[Slot]
    ) -> list[Entry]:
        """What `_layout` will be when `build` is done."""
        weights = [Weight.of(variable) for variable in variables]
        base = []
        if self.use_ema:
            base += [
                (weight, "average")
                for weight, variable in zip(weights, variables)
                if not self.has_no_update(variable)
            ]
        if self.gradient_accumulation_steps:
            base += [(weight, "gradient_accumulator") for weight in weights]
        return [
            *self._layout(),
            *(Entry(f"{w.path}_{kind}", kind, w.shape) for w, kind in base),
            *(
                Entry(
                    f"{weights[slot.index].path}_{slot.name}",
                    f"{weights[slot.index].name}/{slot.name}",
                    slot.shape,
                )
                for slot in slots
            ),
        ]

    @property
    def block_state(self) -> State:
        """The blocks and the state variables that belong to them."""
        if self._state is None:
            raise ValueError(
                f"{type(self).__name__} must be built before it has blocks. "
                "Call `optimizer.build(model.trainable_variables)` first."
            )
        return self._state


def new_entries(
    step: Callable[..., tuple[Tensor, Tensor]],
    dtype: str,
    finite: Tensor,
    scale: Tensor,
    g: Tensor,
    w: Tensor,
    m: Tensor = None,
) -> list[Tensor]:
    """`step` in a dtype that the entries may not have, if `finite`.

    Returns:
        The new `w`, and the new `m` if there is one.
    """
    g, w = ops.cast(g, dtype), ops.cast(w, dtype)
    m = m if m is None else ops.cast(m, dtype)
    pairs = zip(step(scale, g, w, m), (w, m))
    return [
        # It is `True` itself without `skip_nonfinite`.
        new if finite is True else ops.where(finite, new, old)
        for new, old in pairs
        if old is not None
    ]


def check_layout(
    own: Sequence[Entry], received: Sequence[tuple[str, Shape]]
) -> None:
    """Raises an error if a saved state is not that of the own variables.

    Args:
        own: The variables of the optimizer.
        received: Kind and shape of each that was saved.
    """
    if INITIAL.issuperset(kind for kind, _ in received):  # Saved when unbuilt.
        own = [entry for entry in own if entry.kind in INITIAL]
    for entry, (kind, shape) in zip(own, received):
        if (entry.kind, entry.shape) != (kind, shape):
            raise ValueError(
                "The saved state must have the blocks of this optimizer. "
                f"{entry.name!r} is {entry.kind} {entry.shape}. Received: "
                f"{kind} {shape}. {REMEDY}"
            )
    if len(own) != len(received):
        raise ValueError(
            f"The saved state must have {len(own)} variables. Received: "
            f"{len(received)}. {REMEDY}"
        )


def decode(names: Any) -> list[str]:
    decoded: list[str] = json.loads(bytes(np.asarray(names)))
    return decoded


def base_slot_name(variable_name: str) -> str:
    """Kind of a variable that Keras's own base class has made."""
    kinds = (*INITIAL, "average", "gradient_accumulator")
    return next(kind for kind in kinds if variable_name.endswith(kind))


def is_number(value: Any) -> bool:
    kinds = (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool)


def check_learning_rate(learning_rate: Any) -> Any:
    if callable(learning_rate):  # Also a learning rate schedule.
        return learning_rate
    if is_number(learning_rate) and 0 <= learning_rate < math.inf:
        return float(learning_rate)
    raise ValueError(
        "`learning_rate` must be a number >= 0, a `LearningRateSchedule` or a "
        f"callable. Received: learning_rate={learning_rate!r}."
    )


def check_fraction(name: str, value: Any) -> float:
    """A hyper-parameter in [0, 1)."""
    return check_number(name, value, 1.0)


def check_non_negative(name: str, value: Any) -> float:
    return check_number(name, value, math.inf)


def check_number(name: str, value: Any, end: float) -> float:
    if not is_number(value) or not 0 <= value < end:
        raise ValueError(
            f"`{name}` must be a number in [0, {end}). Received: "
            f"{name}={value!r}."
        )
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    if not any(value is choice or value == choice for choice in choices):
        raise ValueError(
            f"`{name}` must be one of {list(choices)}. Received: "
            f"{name}={value!r}."
        )
    return value
