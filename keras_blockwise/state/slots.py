"""What a rule needs to remember: slots, one list for all optimizers."""

import math
from collections.abc import Hashable
from collections.abc import Sequence
from dataclasses import dataclass

from keras_blockwise.algorithm.eight_bits import Groups
from keras_blockwise.algorithm.eight_bits import saves_memory
from keras_blockwise.algorithm.rule import Rule
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape

# Bytes of one number of the dtypes that a slot can have.
ITEM_SIZES = {
    "int8": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
}
# The slot of the scales of a momentum in 8 bits.
SCALE = "momentum_scale"
# Those of variables that can be trained.
FLOATS = [dtype for dtype in ITEM_SIZES if dtype != "int8"]

# What a slot is known by: its name, and a variable's position or a group.
Key = str | int | None


@dataclass(frozen=True)
class Slot:
    """Numbers that an optimizer remembers for a variable or for a group.

    Args:
        index: Position of the variable; of the first of a group.
        name: `"momentum"`, or the name of a block statistic.
        shape: Its shape.
        dtype: Its dtype.
        value: What all of its entries start at.
        kind: What slots have in common that a step treats alike.
    """

    index: int
    name: str
    shape: Shape
    dtype: str
    value: float
    kind: Hashable

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * ITEM_SIZES[self.dtype]


def accumulator_keys(partitions: Sequence[Partition | None]) -> list[Key]:
    """What each variable's accumulator is known by; a group's is shared."""
    return [
        i if p is None or p.group is None else p.group
        for i, p in enumerate(partitions)
    ]


def step_dtypes(
    dtypes: Sequence[str], partitions: Sequence[Partition | None]
) -> list[str]:
    """What the step of each variable is computed in: float32 or wider.

    Args:
        dtypes: Dtypes of the variables.
        partitions: Their blocks.
    """
    keys = accumulator_keys(partitions)
    wide = {key for key, dtype in zip(keys, dtypes) if dtype == "float64"}
    return ["float64" if key in wide else "float32" for key in keys]


def plan_slots(
    rule: Rule,
    dtypes: Sequence[str],
    partitions: Sequence[Partition | None],
    momentum_dtype: str | None,
    places: Sequence[Hashable],
) -> list[Slot]:
    """The slots of an optimizer, in saved order.

    Args:
        rule: The optimizer.
        dtypes: Dtypes of the variables to update.
        partitions: Their blocks; `None` for a variable without an update.
        momentum_dtype: Dtype of the momentum; `None` for that of the variable.
        places: Where each is; slots of one place can be kept together.
    """
    keys = accumulator_keys(partitions)
    slots = []
    seen = set()
    for i, (partition, step_dtype) in enumerate(
        zip(partitions, step_dtypes(dtypes, partitions))
    ):
        if partition is None:
            continue
        if rule.momentum.has_state:
            slots += momentum_slots(
                i, partition, dtypes[i], step_dtype, momentum_dtype, places[i]
            )
        if keys[i] in seen or partition.block_shape is None:
            continue
        seen.add(keys[i])
        shape = rule.statistic_shape(partition)
        for name, value in rule.second_moment.statistics.items():
            slots.append(
                Slot(
                    i,
                    name,
                    shape,
                    step_dtype,
                    value,
                    kind=(name, step_dtype, places[i]),
                )
            )
    return slots


def momentum_slots(
    index: int,
    partition: Partition,
    dtype: str,
    step_dtype: str,
    momentum_dtype: str | None,
    place: Hashable,
) -> list[Slot]:
    """The momentum of one variable; of two slots if it is kept in 8 bits.

    Args:
        index: Position of the variable.
        partition: Its blocks.
        dtype: Its dtype.
        step_dtype: What its step is computed in.
        momentum_dtype: As in `plan_slots`.
        place: As in `plan_slots`.
    """
    shape = partition.shape
    if momentum_dtype == "int8":
        if saves_memory(partition, ITEM_SIZES[dtype]):
            scale_shape = Groups.of(partition).scale_shape
            return [
                Slot(index, "momentum", shape, "int8", 0.0, ("codes", index)),
                Slot(index, SCALE, scale_shape, "float32", 0.0, (SCALE, index)),
            ]
        momentum_dtype = None
    own = momentum_dtype or dtype
    kind = ("momentum", own, dtype, step_dtype, place)
    return [Slot(index, "momentum", shape, own, 0.0, kind)]
