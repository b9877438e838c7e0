"""The Keras side of every optimizer: arguments, slots, config, loading."""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from functools import partial
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blockwise.blocking.axes import Weight
from keras_blockwise.blocking.blocking import Blocking
from keras_blockwise.blocking.blocking import Row
from keras_blockwise.blocking.blocking import Tile
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.entries import EntryUpdate
from keras_blockwise.execution import FusedOptimizer
from keras_blockwise.execution import read
from keras_blockwise.execution import scheduled_with
from keras_blockwise.reshaping import join
from keras_blockwise.reshaping import reshape
from keras_blockwise.reshaping import take_apart
from keras_blockwise.state import ITEM_SIZES
from keras_blockwise.state import Batch
from keras_blockwise.state import Part
from keras_blockwise.state import Slot
from keras_blockwise.state import State
from keras_blockwise.state import Weights
from keras_blockwise.state import homes
from keras_blockwise.state import plan_slots
from keras_blockwise.step import Rule
from keras_blockwise.step import Scalars
from keras_blockwise.step import averaged
from keras_blockwise.step import block_means
from keras_blockwise.step import block_step
from keras_blockwise.step import broadcastable
from keras_blockwise.step import entry_step
from keras_blockwise.step import own_block_step

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
        slot_variables = []
        for members in homes(slots):
            slot = members[0]
            first = variables[slot.index]
            name, shape = slot_name(Weight.of(first), slot), slot.shape
            if len(members) > 1:
                name = f"small_{slot.name}"
                shape = (sum(member.size for member in members),)
            slot_variables.append(
                self.add_slot(first, name, shape, slot.dtype, slot.value)
            )
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

    def variables_of(self, indices: Sequence[int]) -> Batch:
        state = self.block_state

        def weight_decay(i: int) -> float:
            row = state.rows[i]
            if row is None or row.kind in self.undecayed_kinds:
                return 0.0
            return self.weight_decay_of(state.variables[i])

        return state.batch(indices, weight_decay)

    def first_and_rest(self, indices: Sequence[int]) -> list[slice]:
        return self.block_state.first_and_rest(indices)

    def update_all(
        self,
        batch: Batch,
        gradients: Sequence[Tensor],
        learning_rate: Tensor,
        iterations: Tensor,
    ) -> Tensor:
        rule = self.block_state.rule
        values, statistics = read_batch(batch)
        means = self._means(batch, gradients, values)
        finite = True
        if self.skip_nonfinite:
            averages = [own_means["velocity"] for own_means in means]
            for weights in batch.weights:
                if "velocity" in weights.state:
                    g = gradients[weights.positions[0]]
                    g = ops.cast(g, step_dtype(weights.state))
                    averages.append(averaged(rule, g)["velocity"])
            finite = ops.all(
                ops.stack([ops.all(ops.isfinite(x)) for x in averages])
            )

        @functools.cache
        def scalars(dtype: str) -> Scalars:
            t = ops.cast(iterations, dtype) + 1
            return Scalars.of(rule, t, ops.cast(learning_rate, dtype))

        scales, assignments = self._block_steps(
            batch, means, statistics, scalars, finite
        )
        updates = [
            self._entry_update(
                weights,
                own_values,
                join([gradients[p] for p in weights.positions]),
                [scales[p] for p in weights.positions if p in scales],
                scalars,
                finite,
            )
            for weights, own_values in zip(batch.weights, values)
        ]
        for weights, new in zip(batch.weights, self.new_values(updates)):
            w, *state = new
            shapes = [p.shape for p in weights.partitions]
            for variable, value in zip(
                weights.variables, take_apart(w, shapes)
            ):
                self.assign(variable, value)
            assignments += zip(weights.state.values(), state)
        for part, value in assignments:
            self._assign_part(part, value)
        return finite

    def _block_steps(
        self,
        batch: Batch,
        means: Sequence[dict[str, Tensor]],
        statistics: Mapping[int, dict[str, Tensor]],
        scalars: Callable[[str], Scalars],
        finite: Tensor,
    ) -> tuple[dict[int, Tensor], list[tuple[Part, Tensor]]]:
        """The scale by position of a variable, and what to assign."""
        rule = self.block_state.rule
        scales: dict[int, Tensor] = {}
        assignments: list[tuple[Part, Tensor]] = []
        for k, accumulators in enumerate(batch.accumulators):
            own_means = means[k]
            dtype = step_dtype(accumulators.statistics)
            old = {
                name: reshape(value, own_means["velocity"].shape)
                for name, value in statistics[k].items()
            }
            scale, new = block_step(rule, scalars(dtype), own_means, old)
            for name, part in accumulators.statistics.items():
                value = new[name]
                if self.skip_nonfinite:
                    value = ops.where(finite, value, old[name])
                assignments.append((part, value))
            groups = accumulators.groups
            shapes = [g.partitions[0].accumulator_shape for g in groups]
            for group, own_scale in zip(groups, take_apart(scale, shapes)):
                for position in group.positions:
                    scales[position] = own_scale
        return scales, assignments

    def _entry_update(
        self,
        weights: Weights,
        values: Sequence[Tensor],
        gradient: Tensor,
        scales: Sequence[Tensor],
        scalars: Callable[[str], Scalars],
        finite: Tensor,
    ) -> EntryUpdate:
        """How variables take a step, with their state of every entry."""
        rule = self.block_state.rule
        inputs: list[Tensor] = []
        spares_traffic = True
        step: Callable[..., tuple[Tensor, ...]]
        if scales:
            dtype = dtype_of(scales[0])
            shape, *inputs = broadcastable(scales, weights.partitions)
            step = entry_step
            # With the momentum of g, w needs only what m is to be.
            spares_traffic = (
                "momentum" in weights.state and not rule.momentum_of_gradient
            )
        else:
            dtype = step_dtype(weights.state)
            shape = weights.partitions[0].shape
            step = own_block_step
        inputs.append(reshape(gradient, shape))
        step = partial(step, rule, scalars(dtype), weights.weight_decay)
        # The weight decay of several may differ; and XLA would copy all of a
        # variable that is stored in 16 bits.
        in_parts = len(weights.variables) == 1 and all(
            dtype_of(value) == dtype for value in values
        )
        return EntryUpdate(
            partial(new_entries, step, dtype, finite, len(inputs)),
            shape,
            tuple(inputs),
            tuple(reshape(value, shape) for value in values),
            in_parts,
            in_parts and spares_traffic,
        )

    def _means(
        self,
        batch: Batch,
        gradients: Sequence[Tensor],
        values: Sequence[Sequence[Tensor]],
    ) -> list[dict[str, Tensor]]:
        """The block means of the accumulators, those kept together joined."""
        rule = self.block_state.rule
        materialize = self.materializer()
        gradients = list(gradients)
        if materialize is not None:
            for weights, (w, *_) in zip(batch.weights, values):
                for i, p in zip(weights.positions, weights.partitions):
                    if p.block_size > 1:
                        gradients[i] = scheduled_with(w, gradients[i])
        means = []
        for accumulators in batch.accumulators:
            dtype = step_dtype(accumulators.statistics)
            each = [
                block_means(
                    rule,
                    [ops.cast(gradients[i], dtype) for i in group.positions],
                    group.partitions,
                    materialize,
                )
                for group in accumulators.groups
            ]
            means.append({n: join([m[n] for m in each]) for n in each[0]})
        return means

    def _assign_part(self, part: Part, value: Tensor) -> None:
        variable, index = part
        if index is not None:
            value = ops.scatter_update(
                read(variable),
                index[:, None],
                ops.cast(reshape(value, index.shape), variable.dtype),
            )
        self.assign(variable, reshape(value, variable.shape))

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
        """Saves the state, each slot by itself, and the name of each."""
        base = (variable.numpy() for variable in self._base_variables())
        slots = () if self._state is None else self._state.values()
        for i, value in enumerate(itertools.chain(base, slots)):
            store[str(i)] = value
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
        values = [saved[str(i)] for i in range(len(kinds))]
        shapes = [tuple(value.shape) for value in values]
        layout = self._layout()
        check_layout(layout, list(zip(kinds, shapes)))
        # Fewer than there are, if saved before the first step.
        variables = [
            variable
            for variable, entry in zip(self._base_variables(), layout)
            if entry.kind in kinds
        ]
        for variable, value in zip(variables, values):
            variable.assign(value)
        if len(values) > len(variables):
            self.block_state.assign(values[len(variables) :])

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

    def _base_variables(self) -> list[Variable]:
        """The variables of Keras's own base class, and `skipped_steps`."""
        slots = [] if self._state is None else self._state.slot_variables
        own = {id(variable) for variable in slots}
        return [v for v in self.variables if id(v) not in own]

    def _layout(self) -> list[Entry]:
        """What the optimizer saves, in order."""
        layout = [
            Entry(v.name, base_slot_name(v.name), tuple(v.shape))
            for v in self._base_variables()
        ]
        if self._state is None:
            return layout
        state = self._state
        return layout + slot_entries(state.variables, state.slots)

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
            *slot_entries(variables, slots),
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


def slot_entries(
    variables: Sequence[Variable], slots: Sequence[Slot]
) -> list[Entry]:
    """The slots as they are known in a saved state."""
    weights = [Weight.of(variable) for variable in variables]
    return [
        Entry(
            slot_name(weights[slot.index], slot),
            f"{weights[slot.index].name}/{slot.name}",
            slot.shape,
        )
        for slot in slots
    ]


def slot_name(weight: Weight, slot: Slot) -> str:
    return f"{weight.path}_{slot.name}".replace("/", "_").replace(":", "_")


def read_batch(
    batch: Batch,
) -> tuple[list[list[Tensor]], dict[int, dict[str, Tensor]]]:
    """The values of all variables of a step, in the order to work on them.

    Returns:
        For each of `weights` the variables, joined, and their state; for each
        of `accumulators` the statistics.
    """
    kept_in = {
        position: k
        for k, accumulators in enumerate(batch.accumulators)
        for group in accumulators.groups
        for position in group.positions
    }
    values = []
    statistics: dict[int, dict[str, Tensor]] = {}
    for weights in batch.weights:
        for k in {kept_in[p]: None for p in weights.positions if p in kept_in}:
            if k not in statistics:
                parts = batch.accumulators[k].statistics
                statistics[k] = {n: read_part(p) for n, p in parts.items()}
        w = join([read(variable) for variable in weights.variables])
        values.append([w, *map(read_part, weights.state.values())])
    return values, statistics


def step_dtype(statistics: Mapping[str, Part]) -> str:
    """Float32 or wider: in bfloat16, a `beta_2` of 0.999 is 1."""
    return dtype_of(statistics["velocity"].variable)


def read_part(part: Part) -> Tensor:
    value = read(part.variable)
    return value if part.index is None else ops.take(value, part.index)


def dtype_of(x: Tensor) -> str:
    dtype: str = keras.backend.standardize_dtype(x.dtype)
    return dtype


def new_entries(
    step: Callable[..., tuple[Tensor, ...]],
    dtype: str,
    finite: Tensor,
    num_inputs: int,
    *tensors: Tensor,
) -> list[Tensor]:
    """`step` in a dtype that the entries may not have, if `finite`.

    Returns:
        What is new for those of `tensors` that come after the inputs.
    """
    tensors = tuple(ops.cast(x, dtype) for x in tensors)
    pairs = zip(step(*tensors), tensors[num_inputs:])
    # It is `True` itself without `skip_nonfinite`.
    return [
        new if finite is True else ops.where(finite, new, old)
        for new, old in pairs
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
