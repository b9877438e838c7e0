"""The state variables of an optimizer: which there are, and who shares them."""

import itertools
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_blockwise.blocking.axes import Weight
from keras_blockwise.blocking.blocking import Row
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.step import Rule

Variable = Any
Array = Any

# Bytes of one number of the dtypes that a state variable can have.
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


# A program takes as long to start for one more variable as to move thousands
# of numbers. So slots of fewer numbers than `SMALL` are kept together in one
# variable, `TOGETHER` of a kind. XLA compiles that many kernels, which are the
# same for the next ones. A `tf.train.Checkpoint` has the variables as they are,
# so other numbers here are another format.
SMALL = 4096
TOGETHER = 16
# How many variables at least to update by themselves when the last gradient is
# made, which is that of the first layer.
FEW = 3


class Part(NamedTuple):
    """Numbers of a state variable.

    Args:
        variable: The state variable.
        index: Where they are in it; `None` for all of them.
    """

    variable: Variable
    index: Any = None


class Group(NamedTuple):
    """Variables that share one accumulator.

    Args:
        positions: Where their gradients are in the list of gradients.
        partitions: Their blocks.
    """

    positions: tuple[int, ...]
    partitions: tuple[Partition, ...]

    @property
    def has_blocks_of_one(self) -> bool:
        """Whether it is one variable, and every entry of it is a block."""
        first, *others = self.partitions
        return not others and first.group is None and first.block_size == 1


class Accumulators(NamedTuple):
    """Accumulators that are kept together.

    Args:
        groups: What each is an accumulator of.
        statistics: The numbers of all of them, by name of the slot.
    """

    groups: tuple[Group, ...]
    statistics: dict[str, Part]


class Weights(NamedTuple):
    """Variables whose state of every entry is kept together.

    Args:
        positions: Where their gradients are in the list of gradients.
        partitions: Their blocks.
        variables: The variables.
        weight_decay: Their decoupled weight decay, of each entry if it differs.
        state: What has a number for every entry, by name of the slot: the
            momentum of all of them if there is one; the statistics of a single
            one, the last first, if every entry of it is a block.
    """

    positions: tuple[int, ...]
    partitions: tuple[Partition, ...]
    variables: tuple[Variable, ...]
    weight_decay: float | np.ndarray
    state: dict[str, Part]


class Batch(NamedTuple):
    """Some variables, with all of their state.

    Args:
        accumulators: Those of all blocks but the entries of single `weights`.
        weights: The variables.
    """

    accumulators: list[Accumulators]
    weights: list[Weights]


@dataclass(frozen=True)
class Slot:
    """A state variable that an optimizer needs.

    Args:
        index: Position of the variable that it belongs to; of the first of a
            group.
        name: `"momentum"`, or the name of a block statistic.
        shape: Its shape.
        dtype: Its dtype.
        value: What all of its entries start at.
        home: Number of the state variable that it is kept in.
    """

    index: int
    name: str
    shape: Shape
    dtype: str
    value: float
    home: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * ITEM_SIZES[self.dtype]


def accumulator_keys(
    partitions: Sequence[Partition | None],
) -> list[str | int | None]:
    """What each variable's accumulator is known by; a group's is shared."""
    return [
        i if p is None or p.group is None else p.group
        for i, p in enumerate(partitions)
    ]


def plan_slots(
    rule: Rule,
    dtypes: Sequence[str],
    partitions: Sequence[Partition | None],
    momentum_dtype: str | None,
) -> list[Slot]:
    """The state variables that an optimizer needs, in saved order.

    Args:
        rule: The optimizer.
        dtypes: Dtypes of the variables to update.
        partitions: Their blocks; `None` for a variable without an update.
        momentum_dtype: Dtype of the momentum; `None` for that of the variable.
    """
    keys = accumulator_keys(partitions)
    wide = {key for key, dtype in zip(keys, dtypes) if dtype == "float64"}
    slots = []
    kinds: list[tuple[str, ...]] = []
    seen = set()
    for i, partition in enumerate(partitions):
        if partition is None:
            continue
        step_dtype = "float64" if keys[i] in wide else "float32"
        if rule.momentum.has_state:
            dtype = momentum_dtype or dtypes[i]
            slots.append(Slot(i, "momentum", partition.shape, dtype, 0.0, 0))
            kinds.append(("momentum", dtype, dtypes[i], step_dtype))
        if keys[i] in seen:
            continue
        seen.add(keys[i])
        for name, value in rule.statistics.items():
            shape = partition.accumulator_shape
            slots.append(Slot(i, name, shape, step_dtype, value, 0))
            kinds.append((name, step_dtype))
    return housed(slots, kinds)


def housed(slots: Sequence[Slot], kinds: Sequence[Any]) -> list[Slot]:
    """Slots with their `home`, one for `TOGETHER` small ones of a kind."""
    alike: dict[Any, list[int]] = {}
    for i, (slot, kind) in enumerate(zip(slots, kinds)):
        if slot.size < SMALL:
            alike.setdefault(kind, []).append(i)
    first = list(range(len(slots)))
    for members in alike.values():
        for start in range(0, len(members) - TOGETHER + 1, TOGETHER):
            for i in members[start : start + TOGETHER]:
                first[i] = members[start]
    number: dict[int, int] = {}
    return [
        replace(slot, home=number.setdefault(first[i], len(number)))
        for i, slot in enumerate(slots)
    ]


def homes(slots: Sequence[Slot]) -> list[list[Slot]]:
    """The slots in each state variable."""
    members: list[list[Slot]] = [[] for _ in {slot.home for slot in slots}]
    for slot in slots:
        members[slot.home].append(slot)
    return members


def of_entries(
    values: Sequence[float], sizes: Sequence[int]
) -> float | np.ndarray:
    """Values of variables of these sizes, entry by entry if they differ."""
    return values[0] if len(set(values)) == 1 else np.repeat(values, sizes)


class State:
    """The state variables of an optimizer, and who shares them.

    Neither a list nor a dict nor a Keras object: the optimizer tracks the
    variables itself, and a second path to them would be saved as well.

    Args:
        rule: The optimizer.
        variables: The variables to update.
        rows: Their blocks; `None` for a variable without an update.
        slots: What `plan_slots` returns.
        slot_variables: A state variable for each of `homes(slots)`.
    """

    def __init__(
        self,
        rule: Rule,
        variables: Sequence[Variable],
        rows: Sequence[Row | None],
        slots: Sequence[Slot],
        slot_variables: Sequence[Variable],
    ) -> None:
        self.rule = rule
        self.variables = tuple(variables)
        self.rows = tuple(rows)
        self.slots = tuple(slots)
        self.slot_variables = tuple(slot_variables)
        self._partitions = {
            i: row.partition for i, row in enumerate(rows) if row
        }
        self._keys = accumulator_keys([row and row.partition for row in rows])
        self._starts: dict[Slot, int] = {}
        self._counts: list[int] = []
        for members in homes(slots):
            ends = itertools.accumulate(slot.size for slot in members)
            self._starts |= zip(members, [0, *ends])
            self._counts.append(len(members))
        self._slots = {
            (slot.name, self._keys_of(slot.name)[slot.index]): slot
            for slot in slots
        }

    @property
    def paths(self) -> list[str]:
        return [Weight.of(variable).path for variable in self.variables]

    @property
    def partitions(self) -> tuple[Partition | None, ...]:
        return tuple(row and row.partition for row in self.rows)

    def values(self) -> Iterator[Array]:
        """The value of each slot, in saved order."""
        for slot in self.slots:
            numbers = self.slot_variables[slot.home].numpy().ravel()
            start = self._starts[slot]
            yield numbers[start : start + slot.size].reshape(slot.shape)

    def assign(self, values: Sequence[Array]) -> None:
        """Sets every slot; `values` are in saved order."""
        by_slot = dict(zip(self.slots, values))
        for variable, members in zip(self.slot_variables, homes(self.slots)):
            numbers = [np.ravel(by_slot[slot]) for slot in members]
            variable.assign(np.concatenate(numbers).reshape(variable.shape))

    def values_by_weight(self) -> dict[str, dict[int, Array]]:
        """Values by name of the slot and position of the weight they are for.

        What a group shares stands there for each of its members.
        """
        values = dict(zip(self.slots, self.values()))
        names = ["momentum"] * self.rule.momentum.has_state
        return {
            name: {
                i: values[self._slots[name, key]]
                for i, key in enumerate(self._keys_of(name))
                if i in self._partitions
            }
            for name in [*names, *self.rule.statistics]
        }

    def _keys_of(self, name: str) -> Sequence[Any]:
        return range(len(self.rows)) if name == "momentum" else self._keys

    def batch(
        self, indices: Sequence[int], weight_decay: Callable[[int], float]
    ) -> Batch:
        """The given variables, with their state.

        Args:
            indices: Positions of the variables.
            weight_decay: Tells the weight decay of the variable at a position.
        """
        partitions = [self._partitions[i] for i in indices]
        members: dict[Any, list[int]] = {}
        for position, i in enumerate(indices):
            members.setdefault(self._keys[i], []).append(position)
        together: list[tuple[Sequence[int], dict[str, Part]]]
        if self.rule.momentum.has_state:
            together = [
                (own, {"momentum": part})
                for own, part in self._together("momentum", indices)
            ]
        else:
            together = [((i,), {}) for i in indices]
        state_of = {own[0]: s for own, s in together if len(own) == 1}
        accumulators = []
        for keys, _ in self._together("velocity", list(members)):
            groups = tuple(
                Group(
                    tuple(members[k]), tuple(partitions[p] for p in members[k])
                )
                for k in keys
            )
            statistics = {}
            for name in self.rule.statistics:
                ((_, statistics[name]),) = self._together(name, keys)
            ((key, *others), (group, *_)) = keys, groups
            if not others and key in state_of and group.has_blocks_of_one:
                state_of[key] |= reversed(statistics.items())
            else:
                accumulators.append(Accumulators(groups, statistics))
        position_of = {i: position for position, i in enumerate(indices)}
        return Batch(
            accumulators,
            [
                Weights(
                    tuple(position_of[i] for i in own),
                    tuple(self._partitions[i] for i in own),
                    tuple(self.variables[i] for i in own),
                    of_entries(
                        [weight_decay(i) for i in own],
                        [math.prod(self._partitions[i].shape) for i in own],
                    ),
                    state,
                )
                for own, state in together
            ],
        )

    def first_and_rest(self, indices: Sequence[int]) -> list[slice]:
        """The first few of `indices` and the rest, which share no accumulator.

        One slice of all if they cannot be cut.
        """
        last = {self._keys[i]: position for position, i in enumerate(indices)}
        end = 0
        for position, i in enumerate(indices):
            if end < position and position >= FEW:
                return [slice(position), slice(position, None)]
            end = max(end, last[self._keys[i]])
        return [slice(None)]

    def _together(
        self, name: str, keys: Sequence[Any]
    ) -> list[tuple[list[Any], Part]]:
        """Keys of slots that are in one variable, and their numbers there."""
        found: dict[int, dict[Any, Slot]] = {}
        for key in keys:
            slot = self._slots[name, key]
            found.setdefault(slot.home, {})[key] = slot
        together = []
        for home, slots in found.items():
            own = sorted(slots, key=lambda key: self._starts[slots[key]])
            index = None
            if len(own) < self._counts[home]:
                index = np.concatenate(
                    [
                        self._starts[slots[key]] + np.arange(slots[key].size)
                        for key in own
                    ]
                )
            together.append((own, Part(self.slot_variables[home], index)))
        return together
