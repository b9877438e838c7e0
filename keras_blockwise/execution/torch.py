"""PyTorch: variables that differ in their values alone are updated as one.

PyTorch runs each operation when Python comes to it, which takes longer than to
compute with thousands of numbers. So where there are several small variables of
one shape and with the same blocks, a step sees one variable: a stack of them.
"""

import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import torch

from keras_blockwise.algorithm.units import Accumulators
from keras_blockwise.algorithm.units import Batch
from keras_blockwise.algorithm.units import Group
from keras_blockwise.algorithm.units import Weights
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.execution.hooks import scalars_of
from keras_blockwise.execution.plain import PlainOptimizer
from keras_blockwise.state.storage import EncodedPart
from keras_blockwise.state.storage import Part
from keras_blockwise.state.storage import Storage

Tensor = Any
Variable = Any

# Most entries of a variable in a stack: the step copies them.
LARGEST = 2**15


class TorchOptimizer(PlainOptimizer):
    """Keras's hooks on PyTorch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stacked = StackedBatches()

    def update_together(
        self,
        indices: tuple[int, ...],
        gradients: Sequence[Tensor],
        learning_rate: Tensor,
    ) -> None:
        """A step of the variables at some positions."""
        if self._is_stateless():
            super().update_together(indices, gradients, learning_rate)
            return
        batches = self._stacked.batches
        if indices not in batches:
            batches[indices] = stack_alike(
                self.block_state, indices, self._weight_decay_of
            )
        batch, others, stacks = batches[indices]
        of_variable = dict(zip(indices, gradients))
        with torch.no_grad():
            taken = self._update(
                batch,
                [
                    *(of_variable[i] for i in others),
                    *(torch.stack([of_variable[i] for i in s]) for s in stacks),
                ],
                scalars_of(self, learning_rate),
                self.kernels,
                lambda variable: variable.value,
            )
            self._count(self._counters, taken)

    def _is_stateless(self) -> bool:
        """Whether Keras records what is assigned, and assigns nothing."""
        value = self._iterations.value
        self._iterations.assign(value + 0)
        return self._iterations.value is not value


class StackedBatch(NamedTuple):
    """Variables of a step, some of them in stacks.

    Args:
        batch: What to update.
        others: The positions of the variables that come first, as they are.
        stacks: The positions of the variables in each stack.
    """

    batch: Batch
    others: list[int]
    stacks: list[list[int]]


class StackedBatches:
    """What the first step made for those after it.

    A plain object, so that Keras does not look inside.
    """

    def __init__(self) -> None:
        self.batches: dict[tuple[int, ...], StackedBatch] = {}


def memory_of(variable: Variable) -> Tensor:
    """What to write to; `value` takes long to ask, and may be a copy."""
    return variable._value


class Stack:
    """Variables of one shape, as one that has a further axis."""

    def __init__(self, variables: Sequence[Variable]) -> None:
        self.variables = variables

    def values(self) -> list[Tensor]:
        return [memory_of(variable) for variable in self.variables]

    @property
    def value(self) -> Tensor:
        return torch.stack(self.values())

    def assign(self, value: Tensor) -> None:
        torch._foreach_copy_(self.values(), value.unbind())


class Slots:
    """Slots that are kept in several state variables, as one tensor.

    Args:
        parts: Where they are kept, one after the other.
        sizes: How many numbers each slot has, of each part.
        shape: Shape of the tensor.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        sizes: Sequence[Sequence[int]],
        shape: Shape,
    ) -> None:
        self.shape = shape
        self.sizes = list(itertools.chain(*sizes))
        self.cuts = [
            (part.variable, cuts(part, own)) for part, own in zip(parts, sizes)
        ]

    def values(self) -> list[Tensor]:
        """Each slot, as a view of the variable where it is kept."""
        values: list[Tensor] = []
        for variable, own in self.cuts:
            values += memory_of(variable).view(-1).split(own)[1::2]
        return values

    @property
    def value(self) -> Tensor:
        return torch.cat(self.values()).view(self.shape)

    def assign(self, value: Tensor) -> None:
        new = value.reshape(-1).split(self.sizes)
        torch._foreach_copy_(self.values(), new)


def cuts(part: Part, sizes: Sequence[int]) -> list[int]:
    """How long the pieces of a state variable are: others, a slot, and so on.

    Args:
        part: Where some slots are in it.
        sizes: How many numbers each slot has.
    """
    count = math.prod(part.variable.shape)
    numbers = range(count) if part.index is None else part.index
    found, end = [], 0
    for first, size in zip(itertools.accumulate(sizes, initial=0), sizes):
        start = int(numbers[first])
        found += [start - end, size]
        end = start + size
    return [*found, count - end]


def stacked(
    batch: Batch, own: Sequence[int], position: int
) -> tuple[Accumulators, Weights]:
    """Variables that differ in their values alone, as one.

    Args:
        batch: The variables, in the order of the optimizer.
        own: Their positions in the optimizer.
        position: That of their gradient.
    """
    accumulators, weights = batch.accumulators[0], batch.weights[0]
    variables = [v for unit in batch.weights for v in unit.variables]
    partition = weights.partitions[0]
    shape = (len(variables), *partition.shape)
    block_shape = partition.block_shape
    if block_shape is not None:
        block_shape = (1, *block_shape)
    stack = Partition(shape, block_shape)
    numbers = np.reshape(own, (-1, *(1 for _ in partition.shape)))

    def slots(parts: Sequence[Part], units: Sequence[Any], of: Shape) -> Part:
        counts = [len(unit) for unit in units]
        sizes = [[math.prod(of[1:])] * count for count in counts]
        return Part(Slots(parts, sizes, of))

    groups = [unit.groups for unit in batch.accumulators]
    statistics = zip(*(unit.statistics for unit in batch.accumulators))
    members = [unit.positions for unit in batch.weights]
    momentum = zip(*(unit.momentum for unit in batch.weights))
    return accumulators._replace(
        groups=(Group((position,), (stack,)),),
        statistics=tuple(slots(s, groups, stack.grid) for s in statistics),
    ), weights._replace(
        variable_of=np.broadcast_to(numbers, shape),
        positions=(position,),
        partitions=(stack,),
        variables=(Stack(variables),),
        momentum=tuple(slots(m, members, shape) for m in momentum),
    )


def viewed(
    part: Part | EncodedPart, shapes: Sequence[Shape]
) -> Part | EncodedPart:
    """Slots of these shapes, as views if they share a variable with others."""
    if isinstance(part, EncodedPart) or part.index is None:
        return part
    sizes = [math.prod(shape) for shape in shapes]
    return Part(Slots([part], [sizes], (sum(sizes),)))


def unstacked(batch: Batch) -> Batch:
    """Variables that are not in a stack."""
    accumulators, weights = [], []
    for own in batch.accumulators:
        shapes = [group.accumulator_shape for group in own.groups]
        statistics = tuple(viewed(part, shapes) for part in own.statistics)
        accumulators.append(own._replace(statistics=statistics))
    for unit in batch.weights:
        shapes = [partition.shape for partition in unit.partitions]
        momentum = tuple(viewed(part, shapes) for part in unit.momentum)
        weights.append(unit._replace(momentum=momentum))
    return Batch(accumulators, weights, batch.matrices)


def stack_alike(
    state: Storage,
    indices: Sequence[int],
    weight_decay: Callable[[int], float],
) -> StackedBatch:
    """What `state.batch` returns, with stacks of variables that are alike."""
    alike: dict[Any, list[int]] = {}
    is_matrix = state.has_matrices
    # In the order in which their state is kept.
    for i in sorted(indices):
        variable, partition = state.variables[i], state.partitions[i]
        key: Any = i
        if (
            partition is not None
            and partition.group is None
            and not is_matrix[i]
            and i not in state.in_8_bits
            and math.prod(partition.shape) <= LARGEST
        ):
            device = variable.value.device
            key = partition, variable.dtype, device, weight_decay(i)
        alike.setdefault(key, []).append(i)
    others = [i for own in alike.values() if len(own) == 1 for i in own]
    stacks = [own for own in alike.values() if len(own) > 1]
    accumulators, weights, matrices = unstacked(
        state.batch(others, weight_decay)
    )
    for position, own in enumerate(stacks, len(others)):
        unit = stacked(state.batch(own, weight_decay), own, position)
        accumulators.append(unit[0])
        weights.append(unit[1])
    batch = Batch(accumulators, weights, matrices)
    return StackedBatch(batch, others, stacks)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, without the graph of its gradients."""
    without_gradients: Callable[..., Any] = torch.no_grad()(function)
    return without_gradients


def reading(
    function: Callable[..., Any], variables: Sequence[Variable]
) -> Callable[..., Any]:
    """The function, whose first argument is the values of variables."""
    plain = compiled(function)
    return lambda *others: plain([v.value for v in variables], *others)


def number_of_replicas(model: keras.Model) -> int:
    """How many copies of a model are trained together."""
    groups = torch.distributed.is_available()
    if not groups or not torch.distributed.is_initialized():
        return 1
    return int(torch.distributed.get_world_size())
