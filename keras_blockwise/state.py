"""The state variables of an optimizer: which there are, and who shares them."""

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras

from keras_blockwise.inference import Weight
from keras_blockwise.partition import Partition
from keras_blockwise.step import Rule

Variable = Any
Key = Hashable


class Group(NamedTuple):
    """Variables that share one accumulator, with all of their state.

    Args:
        positions: Where their gradients are in the list of gradients.
        partitions: Their blocks.
        weights: The variables.
        moments: The momentum of each, or `None`.
        statistics: The accumulators, by name of the slot.
    """

    positions: tuple[int, ...]
    partitions: tuple[Partition, ...]
    weights: tuple[Variable, ...]
    moments: tuple[Variable | None, ...]
    statistics: dict[str, Variable]


class State:
    """The state variables of all weights, created in the order they are saved.

    Neither a list nor a dict nor a Keras object: the optimizer tracks the
    variables itself, and a second path to them would be saved as well.

    Args:
        rule: The optimizer.
        variables: The variables to update.
        partitions: Their blocks; `None` for a variable without an update.
        momentum_dtype: Dtype of the momentum; `None` for that of the variable.
        add_slot: Creates a state variable, given the variable it belongs to
            and the name, shape, dtype and initial value of the new one.
    """

    def __init__(
        self,
        rule: Rule,
        variables: Sequence[Variable],
        partitions: Sequence[Partition | None],
        momentum_dtype: str | None,
        add_slot: Callable[..., Variable],
    ) -> None:
        self.rule = rule
        self.variables = list(variables)
        self.weights = [Weight.of(variable) for variable in variables]
        self.partitions = {
            i: partition for i, partition in enumerate(partitions) if partition
        }
        self.slot_names: list[str] = []
        self._moments: dict[int, Variable] = {}
        self._statistics: dict[Key, dict[str, Variable]] = {}

        dtypes = [keras.backend.standardize_dtype(v.dtype) for v in variables]
        wide = {self._key(i) for i in self.partitions if dtypes[i] == "float64"}
        for i, partition in self.partitions.items():
            variable = variables[i]
            path = self.weights[i].path.replace("/", "_")
            if rule.momentum.has_state:
                self.slot_names.append(f"{self.weights[i].name}/momentum")
                self._moments[i] = add_slot(
                    variable,
                    f"{path}_momentum",
                    partition.shape,
                    momentum_dtype or dtypes[i],
                    0.0,
                )
            key = self._key(i)
            if key in self._statistics:
                continue
            self._statistics[key] = {}
            for name, value in rule.statistics.items():
                self.slot_names.append(f"{self.weights[i].name}/{name}")
                self._statistics[key][name] = add_slot(
                    variable,
                    f"{path}_{name}",
                    partition.accumulator_shape,
                    "float64" if key in wide else "float32",
                    value,
                )

    def _key(self, i: int) -> Key:
        """Names the accumulator of a variable; members of a group share it."""
        return self.partitions[i].group or i

    def groups(self, indices: Sequence[int]) -> list[Group]:
        """The given variables, those that share an accumulator together."""
        positions: dict[Key, list[int]] = {}
        for position, i in enumerate(indices):
            positions.setdefault(self._key(i), []).append(position)
        return [
            Group(
                tuple(members),
                tuple(self.partitions[indices[p]] for p in members),
                tuple(self.variables[indices[p]] for p in members),
                tuple(self._moments.get(indices[p]) for p in members),
                self._statistics[key],
            )
            for key, members in positions.items()
        ]
