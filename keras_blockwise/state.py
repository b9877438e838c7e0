"""The state variables of an optimizer: which there are, and who shares them."""

import math
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

from keras_blockwise.axes import Weight
from keras_blockwise.blocking import Row
from keras_blockwise.partition import Partition
from keras_blockwise.partition import Shape
from keras_blockwise.step import Rule

Variable = Any

# Bytes of one number of the dtypes that a state variable can have.
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class Group(NamedTuple):
    """Variables that share one accumulator, with all of their state.

    Args:
        positions: Where their gradients are in the list of gradients.
        partitions: Their blocks.
        weights: The variables.
        weight_decays: Their decoupled weight decay.
        moments: The momentum of each, or `None`.
        statistics: The accumulators, by name of the slot.
    """

    positions: tuple[int, ...]
    partitions: tuple[Partition, ...]
    weights: tuple[Variable, ...]
    weight_decays: tuple[float, ...]
    moments: tuple[Variable | None, ...]
    statistics: dict[str, Variable]


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
    """

    index: int
    name: str
    shape: Shape
    dtype: str
    value: float

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


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
    seen = set()
    for i, partition in enumerate(partitions):
        if partition is None:
            continue
        if rule.momentum.has_state:
            dtype = momentum_dtype or dtypes[i]
            slots.append(Slot(i, "momentum", partition.shape, dtype, 0.0))
        if keys[i] in seen:
            continue
        seen.add(keys[i])
        dtype = "float64" if keys[i] in wide else "float32"
        slots += [
            Slot(i, name, partition.accumulator_shape, dtype, value)
            for name, value in rule.statistics.items()
        ]
    return slots


class State:
    """The state variables of an optimizer, and who shares them.

    Neither a list nor a dict nor a Keras object: the optimizer tracks the
    variables itself, and a second path to them would be saved as well.

    Args:
        rule: The optimizer.
        variables: The variables to update.
        rows: Their blocks; `None` for a variable without an update.
        slots: What `plan_slots` returns.
        slot_variables: A state variable for each of `slots`.
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
        self.slot_names = {
            id(variable): f"{Weight.of(variables[slot.index]).name}/{slot.name}"
            for slot, variable in zip(slots, slot_variables)
        }
        self._partitions = {
            i: row.partition for i, row in enumerate(rows) if row
        }
        self._keys = accumulator_keys([row and row.partition for row in rows])
        self._moments: dict[int, Variable] = {}
        self._statistics: dict[Any, dict[str, Variable]] = {}
        for slot, variable in zip(slots, slot_variables):
            if slot.name == "momentum":
                self._moments[slot.index] = variable
            else:
                key = self._keys[slot.index]
                self._statistics.setdefault(key, {})[slot.name] = variable

    @property
    def paths(self) -> list[str]:
        return [Weight.of(variable).path for variable in self.variables]

    @property
    def partitions(self) -> tuple[Partition | None, ...]:
        return tuple(row and row.partition for row in self.rows)

    def slots_by_weight(self) -> dict[str, dict[int, Variable]]:
        """State variables by slot and position of the weight they are for.

        What a group shares stands there for each of its members.
        """
        slots: dict[str, dict[int, Variable]] = {}
        if self._moments:
            slots["momentum"] = dict(self._moments)
        for name in self.rule.statistics:
            slots[name] = {
                i: self._statistics[self._keys[i]][name]
                for i in self._partitions
            }
        return slots

    def groups(
        self, indices: Sequence[int], weight_decay: Callable[[int], float]
    ) -> list[Group]:
        """The given variables, those that share an accumulator together.

        Args:
            indices: Positions of the variables.
            weight_decay: Tells the weight decay of the variable at a position.
        """
        members: dict[Any, list[int]] = {}
        for position, i in enumerate(indices):
            members.setdefault(self._keys[i], []).append(position)
        return [
            Group(
                tuple(positions),
                tuple(self._partitions[indices[p]] for p in positions),
                tuple(self.variables[indices[p]] for p in positions),
                tuple(weight_decay(indices[p]) for p in positions),
                tuple(self._moments.get(indices[p]) for p in positions),
                self._statistics[key],
            )
            for key, positions in members.items()
        ]
