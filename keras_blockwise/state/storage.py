"""Where slots are kept: the only file that knows that small ones share.

A program takes as long to start for one more variable as to move thousands of
numbers. So small slots of one kind are kept together in one variable.
"""

import itertools
import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blockwise.algorithm.blocks import reshape
from keras_blockwise.algorithm.eight_bits import Encoding
from keras_blockwise.algorithm.eight_bits import Groups
from keras_blockwise.algorithm.eight_bits import decode
from keras_blockwise.algorithm.rounding import seeds
from keras_blockwise.algorithm.rule import Rule
from keras_blockwise.algorithm.units import Accumulators
from keras_blockwise.algorithm.units import Batch
from keras_blockwise.algorithm.units import Group
from keras_blockwise.algorithm.units import MatrixWeights
from keras_blockwise.algorithm.units import Weights
from keras_blockwise.blocking.axes import Weight
from keras_blockwise.blocking.blocking import Row
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.state.slots import SCALE
from keras_blockwise.state.slots import Key
from keras_blockwise.state.slots import Slot
from keras_blockwise.state.slots import accumulator_keys
from keras_blockwise.state.slots import step_dtypes

Tensor = Any
Variable = Any
Array = Any
# `(variable, name, shape, dtype, value)`, the variable of the first slot.
AddSlot = Callable[[Variable, str, Shape, str, float], Variable]
Read = Callable[[Variable], Tensor]
Assign = Callable[[Variable, Tensor], None]

# Slots with fewer numbers are kept together: a kernel for them takes as long to
# launch as to run. A `tf.train.Checkpoint` has the state variables as they are,
# so this number and the next one are part of its format.
SMALL = 4096
# How many small slots share a variable. XLA compiles one kernel for each of
# them, and uses these again for the next variable.
TOGETHER = 16


# The slots of a momentum in 8 bits.
ENCODED = ("momentum", SCALE)


class Part(NamedTuple):
    """Numbers of a state variable.

    Args:
        variable: The state variable.
        index: Where they are in it; `None` for all of them.
    """

    variable: Variable
    index: Any = None

    def value(self, read: Read) -> Tensor:
        value = read(self.variable)
        return value if self.index is None else ops.take(value, self.index)

    def encoding(self, read: Read, iterations: Tensor) -> None:
        """Nothing: the numbers are kept as they are."""

    def write(
        self,
        values: Sequence[Tensor],
        taken: Tensor,
        read: Read,
        assign: Assign,
    ) -> None:
        """Makes the numbers here those of `values`, a single tensor."""
        (value,) = values
        if self.index is not None:
            value = ops.scatter_update(
                read(self.variable),
                self.index[:, None],
                ops.cast(reshape(value, self.index.shape), self.variable.dtype),
            )
        assign(self.variable, reshape(value, self.variable.shape))


class EncodedPart(NamedTuple):
    """Numbers that are kept in 8 bits, in two state variables.

    Args:
        codes: The codes, in the shape of the variable that they are for.
        scales: The scale of each group.
        groups: The groups.
        number: Which it is of those of an optimizer: 0, 1, ...
    """

    codes: Variable
    scales: Variable
    groups: Groups
    number: int

    def value(self, read: Read) -> Tensor:
        return decode(read(self.codes), read(self.scales), self.groups)

    def encoding(self, read: Read, iterations: Tensor) -> Encoding:
        """How they are kept in a step."""
        return Encoding(
            self.groups,
            seeds(iterations, self.number, self.groups.shape),
            (read(self.codes), read(self.scales)),
        )

    def write(
        self,
        values: Sequence[Tensor],
        taken: Tensor,
        read: Read,
        assign: Assign,
    ) -> None:
        """Keeps codes and scales; those before, if the step was left out."""
        for variable, value in zip((self.codes, self.scales), values):
            value = reshape(value, variable.shape)
            if taken is not True:
                value = ops.where(taken, value, read(variable))
            assign(variable, value)


def packed(slots: Sequence[Slot]) -> list[list[Slot]]:
    """The slots of each state variable, in the order of their first ones."""
    alike: dict[Any, list[int]] = {}
    for i, slot in enumerate(slots):
        if slot.size < SMALL:
            alike.setdefault(slot.kind, []).append(i)
    first = list(range(len(slots)))
    for members in alike.values():
        for start in range(0, len(members) - TOGETHER + 1, TOGETHER):
            for i in members[start : start + TOGETHER]:
                first[i] = members[start]
    packs: dict[int, list[Slot]] = {}
    for i, slot in enumerate(slots):
        packs.setdefault(first[i], []).append(slot)
    return list(packs.values())


def slot_name(weight: Weight, slot: Slot) -> str:
    return f"{weight.path}_{slot.name}".replace("/", "_").replace(":", "_")


class Storage:
    """The variables of an optimizer, its slots, and where these are kept.

    Neither a list nor a dict nor a Keras object: the optimizer tracks the
    state variables itself, and a second path to them would be saved as well.

    Args:
        rule: The optimizer.
        variables: The variables to update.
        rows: Their blocks; `None` for a variable without an update.
        slots: What `plan_slots` returns.
        add_slot: Creates a state variable.
    """

    def __init__(
        self,
        rule: Rule,
        variables: Sequence[Variable],
        rows: Sequence[Row | None],
        slots: Sequence[Slot],
        add_slot: AddSlot,
    ) -> None:
        self.rule = rule
        self.variables = tuple(variables)
        self.rows = tuple(rows)
        self.slots = tuple(slots)
        self._dtypes = step_dtypes(
            [keras.backend.standardize_dtype(v.dtype) for v in variables],
            self.partitions,
        )
        # Of the numbers that all variables share in a step.
        self.widest_dtype = max(self._dtypes, default="float32")
        # What `batch` returns for the positions that it was asked for.
        self.batches: dict[tuple[int, ...], Batch] = {}
        self._packs = packed(slots)
        self._pack_of: dict[Slot, int] = {}
        self._starts: dict[Slot, int] = {}
        slot_variables = []
        for pack, members in enumerate(self._packs):
            first = members[0]
            variable = self.variables[first.index]
            name, shape = slot_name(Weight.of(variable), first), first.shape
            ends = list(itertools.accumulate(slot.size for slot in members))
            if len(members) > 1:
                name, shape = f"small_{first.name}", (ends[-1],)
            slot_variables.append(
                add_slot(variable, name, shape, first.dtype, first.value)
            )
            self._pack_of |= dict.fromkeys(members, pack)
            self._starts |= zip(members, [0, *ends])
        self.slot_variables = tuple(slot_variables)
        self._partitions = {
            i: row.partition for i, row in enumerate(rows) if row
        }
        self._matrices = {
            i: matrices
            for i, row in enumerate(rows)
            if row
            and (matrices := rule.matrices_of(row.partition, row.matrices))
        }
        moments = rule.matrix_moments
        self._turns = moments.turns(self._matrices) if moments else {}
        # Where a variable has no entry, and nothing to update.
        self.empty = {i for i, p in self._partitions.items() if 0 in p.shape}
        self._keys = accumulator_keys(self.partitions)
        self._slots = {
            (slot.name, self._keys_of(slot.name)[slot.index]): slot
            for slot in slots
        }
        # The variables whose momentum is kept in 8 bits, and their numbers.
        encoded = [slot.index for slot in slots if slot.name == SCALE]
        self.in_8_bits = {index: number for number, index in enumerate(encoded)}

    @property
    def has_matrices(self) -> list[bool]:
        """Whether each variable takes a step by matrices."""
        return [i in self._matrices for i in range(len(self.variables))]

    @property
    def names(self) -> list[str]:
        """What there is of each variable, or of some: its kinds of state."""
        momentum = ["momentum"] * self.rule.momentum.has_state
        return [*momentum, *self.rule.second_moment.statistics]

    @property
    def paths(self) -> list[str]:
        return [Weight.of(variable).path for variable in self.variables]

    @property
    def partitions(self) -> tuple[Partition | None, ...]:
        return tuple(row and row.partition for row in self.rows)

    def values(self) -> Iterator[Array]:
        """The value of each slot, in saved order."""
        for slot in self.slots:
            variable = self.slot_variables[self._pack_of[slot]]
            numbers = variable.numpy().ravel()
            start = self._starts[slot]
            yield numbers[start : start + slot.size].reshape(slot.shape)

    def assign(self, values: Sequence[Array]) -> None:
        """Sets every slot; `values` are in saved order."""
        by_slot = dict(zip(self.slots, values))
        for variable, members in zip(self.slot_variables, self._packs):
            numbers = [np.ravel(by_slot[slot]) for slot in members]
            variable.assign(np.concatenate(numbers).reshape(variable.shape))

    def accumulator_keys_of(self, indices: Sequence[int]) -> list[Key]:
        """What the accumulators of some variables are known by."""
        return [self._keys[i] for i in indices]

    def batch(
        self, indices: Sequence[int], weight_decay: Callable[[int], float]
    ) -> Batch:
        """The given variables, with their state.

        Args:
            indices: Positions of the variables.
            weight_decay: Tells the weight decay of the variable at a position.
        """
        position_of = {i: position for position, i in enumerate(indices)}
        others = [i for i in indices if i not in self._matrices]
        together: list[tuple[Sequence[int], tuple[Part | EncodedPart, ...]]]
        if self.rule.momentum.has_state:
            together = [
                (own, (encoded_part(self, own[0]) or part,))
                for own, part in self._together("momentum", others)
            ]
        else:
            together = [((i,), ()) for i in others]
        weights = [
            Weights(
                self._dtypes[own[0]],
                self._of_entries(own, own),
                tuple(position_of[i] for i in own),
                tuple(self._partitions[i] for i in own),
                self._of_entries([weight_decay(i) for i in own], own),
                self._of_entries([self._rate_of(i) for i in own], own),
                tuple(self.variables[i] for i in own),
                momentum,
            )
            for own, momentum in together
        ]
        return Batch(
            self._accumulators(others, position_of),
            weights,
            self._matrix_units(position_of, weight_decay),
        )

    def _accumulators(
        self, indices: Sequence[int], positions: dict[int, int]
    ) -> list[Accumulators]:
        """The accumulators of some variables; without blocks, an empty one.

        Args:
            indices: Positions of the variables.
            positions: Position of the gradient, by that of the variable.
        """
        members: dict[Key, list[int]] = {}
        for i in indices:
            members.setdefault(self._keys[i], []).append(i)
        adapt = {key: ("velocity", key) in self._slots for key in members}
        together = self._together("velocity", [k for k in members if adapt[k]])
        units = [keys for keys, _ in together]
        units += [[key] for key in members if not adapt[key]]
        accumulators = []
        for keys in units:
            groups = tuple(
                Group(
                    tuple(positions[i] for i in members[key]),
                    tuple(self._partitions[i] for i in members[key]),
                )
                for key in keys
            )
            statistics = tuple(
                self._together(name, keys)[0][1]
                for name in self.rule.second_moment.statistics
                if (name, keys[0]) in self._slots
            )
            dtype = self._dtypes[members[keys[0]][0]]
            accumulators.append(Accumulators(dtype, groups, statistics))
        return accumulators

    def _rate_of(self, index: int) -> float:
        has_blocks = self._partitions[index].block_shape is not None
        return 1.0 if has_blocks else self.rule.plain_factor

    def _of_entries(self, values: Sequence[Any], indices: Sequence[int]) -> Any:
        """Values of some variables, entry by entry if they differ."""
        if len(set(values)) == 1:
            return values[0]
        sizes = [math.prod(self._partitions[i].shape) for i in indices]
        return np.repeat(values, sizes)

    def _matrix_units(
        self, positions: dict[int, int], weight_decay: Callable[[int], float]
    ) -> list[MatrixWeights]:
        """The variables at `positions` with matrices, those alike together.

        Args:
            positions: Position of the gradient, by that of the variable.
            weight_decay: As in `batch`.
        """
        alike: dict[Any, list[int]] = {}
        for i in positions:
            if i in self._matrices:
                key = self._dtypes[i], self._partitions[i], self._matrices[i]
                alike.setdefault(key, []).append(i)

        def parts(i: int, names: Iterable[str]) -> tuple[Part, ...]:
            return tuple(self._together(name, [i])[0][1] for name in names)

        statistics = self.rule.second_moment.statistics
        return [
            MatrixWeights(
                dtype,
                tuple(own),
                partition,
                matrices,
                tuple(positions[i] for i in own),
                tuple(weight_decay(i) for i in own),
                tuple(self.variables[i] for i in own),
                tuple(momentum_of(self, i) for i in own),
                tuple(
                    parts(i, [s for s in statistics if (s, i) in self._slots])
                    for i in own
                ),
                tuple(self._turns[i] for i in own if self._turns),
            )
            for (dtype, partition, matrices), own in alike.items()
        ]

    def _keys_of(self, name: str) -> Sequence[Any]:
        return range(len(self.rows)) if name in ENCODED else self._keys

    def _together(
        self, name: str, keys: Sequence[Any]
    ) -> list[tuple[list[Any], Part]]:
        """Keys of slots that are in one variable, and their numbers there."""
        found: dict[int, dict[Any, Slot]] = {}
        for key in keys:
            slot = self._slots[name, key]
            found.setdefault(self._pack_of[slot], {})[key] = slot
        together = []
        for pack, slots in found.items():
            own = sorted(slots, key=lambda key: self._starts[slots[key]])
            index = None
            if len(own) < len(self._packs[pack]):
                index = np.concatenate(
                    [
                        self._starts[slots[key]] + np.arange(slots[key].size)
                        for key in own
                    ]
                )
            together.append((own, Part(self.slot_variables[pack], index)))
        return together


def values_by_weight(state: Storage) -> dict[str, dict[int, Array]]:
    """Values by name of the slot and position of the weight they are for.

    What a group shares stands there for each of its members, and what is kept
    in 8 bits as numbers.
    """
    values = dict(zip(state.slots, state.values()))
    for codes, scale, groups in encoded_slots(state):
        decoded = decode(values[codes], values[scale], groups)
        values[codes] = ops.convert_to_numpy(decoded)
    return {
        name: {
            i: values[state._slots[name, key]]
            for i, key in enumerate(state._keys_of(name))
            if (name, key) in state._slots
        }
        for name in state.names
    }


def assign_by_weight(
    state: Storage, values: dict[str, dict[int, Array]]
) -> None:
    """Sets every slot to what `values_by_weight` would return."""
    new = {
        slot: values[slot.name][slot.index]
        for slot in state.slots
        if slot.name in values
    }
    for codes, scale, groups in encoded_slots(state):
        m = ops.convert_to_tensor(new[codes], "float32")
        encoded = Encoding(groups).encode(m)
        new[codes], new[scale] = map(ops.convert_to_numpy, encoded)
    state.assign([new[slot] for slot in state.slots])


def encoded_slots(state: Storage) -> Iterator[tuple[Slot, Slot, Groups]]:
    """Codes, scales and groups of each momentum that is kept in 8 bits."""
    for i in state.in_8_bits:
        codes, scale = (state._slots[name, i] for name in ENCODED)
        yield codes, scale, Groups.of(state._partitions[i])


def encoded_part(state: Storage, index: int) -> EncodedPart | None:
    """The momentum of one variable, if it is kept in 8 bits."""
    if index not in state.in_8_bits:
        return None
    codes, scales = (
        state._together(name, [index])[0][1].variable for name in ENCODED
    )
    groups = Groups.of(state._partitions[index])
    return EncodedPart(codes, scales, groups, state.in_8_bits[index])


def momentum_of(
    state: Storage, index: int
) -> tuple[()] | tuple[Part | EncodedPart]:
    """The momentum of one variable, kept by itself, if it has one."""
    if not state.rule.momentum.has_state:
        return ()
    ((_, part),) = state._together("momentum", [index])
    return (encoded_part(state, index) or part,)
