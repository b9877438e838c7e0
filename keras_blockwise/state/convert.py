"""Moves the state of a running job to another optimizer or other blocks."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_blockwise.blocking.partition import Partition
from keras_blockwise.state.slots import accumulator_keys
from keras_blockwise.state.storage import Storage
from keras_blockwise.state.storage import assign_by_weight
from keras_blockwise.state.storage import values_by_weight

Variable = Any
Array = Any
# Values by name of the slot and position of the weight that they are for. What
# a group shares stands there for each of its members.
Values = dict[str, dict[int, Array]]
# Those of Keras with the state of `BlockAdam`, up to blocks.
KERAS_ADAMS = (keras.optimizers.Adam, keras.optimizers.Nadam)


def convert_state(
    source: keras.optimizers.Optimizer, target: keras.optimizers.Optimizer
) -> None:
    """Copies the state of one optimizer into another with other blocks.

    The momentum and the count of steps are copied. A second moment of a block
    of the target is the mean of those of the source over the block, or the one
    of the larger block that contains it. Training then goes on with the target
    from where the source was. What is set by hand (learning rates and their
    multipliers, decay rates, ...) is that of the target.

    Args:
        source: A built `keras.optimizers.Adam`, `AdamW` or `Nadam`, or an
            optimizer of this package.
        target: A built optimizer over the same variables: a `BlockAdam`,
            `Adalayer`, `AdamMini` or `BlockNadam` if `source` is one of these
            or Keras's, else one of the class of `source`. Of a
            `keras.optimizers.LossScaleOptimizer`, its `inner_optimizer` is
            meant, in either place.

    Raises:
        ValueError, TypeError: If the two do not fit, or the blocks of neither
            are made of blocks of the other. Nothing has been changed then.

    Example:

    ```python
    model = keras.models.load_model("trained_with_adam.keras")
    optimizer = kb.BlockAdam(3e-3, blocking=kb.Blocking.from_model(model))
    optimizer.build(model.trainable_variables)
    kb.convert_state(model.optimizer, optimizer)
    model.compile(optimizer=optimizer, loss="mse")
    ```
    """
    source, target = (
        getattr(optimizer, "inner_optimizer", optimizer)
        for optimizer in (source, target)
    )
    for name, optimizer in (("source", source), ("target", target)):
        if not getattr(optimizer, "built", False):
            raise ValueError(
                f"`{name}` must be built. Call "
                f"`{name}.build(model.trainable_variables)` first. Received: "
                f"{name}={optimizer!r}."
            )
    family = "adam" if isinstance(source, KERAS_ADAMS) else None
    family = getattr(source, "state_family", family)
    if family is None or getattr(target, "state_family", None) != family:
        raise TypeError(
            "`target` must be a `BlockAdam` or `BlockNadam` for a `source` "
            "that is one or is `keras.optimizers.Adam` or `Nadam`, else an "
            "optimizer of the same class. "
            f"Received: source={type(source).__name__}, "
            f"target={type(target).__name__}."
        )
    state = target.block_state
    steps = [o.gradient_accumulation_steps or 1 for o in (source, target)]
    if steps[0] != steps[1]:  # The count of steps would mean another number.
        raise ValueError(
            "`source` and `target` must have the same "
            f"`gradient_accumulation_steps`. Received: {steps[0]} in source "
            f"and {steps[1]} in target."
        )
    values, old_partitions = values_of(source, state)
    check_nesting(state.paths, old_partitions, state.partitions)
    has_matrices = state.has_matrices
    for name in state.rule.second_moment.statistics:
        old = values[name]
        if state.rule.matrix_moments is not None:
            old = {i: v for i, v in old.items() if not has_matrices[i]}
        # Matrices stay as they are: their blocks are the same.
        new = to_blocks(old, old_partitions, state.partitions)
        values[name] = {**values[name], **new}
    assignments = counters(source, target)
    assign_by_weight(state, values)
    for variable, value in assignments:
        variable.assign(value)


def values_of(
    source: keras.optimizers.Optimizer, state: Storage
) -> tuple[Values, Sequence[Partition | None]]:
    """The state of `source`, and its blocks, for the variables of `state`."""
    if hasattr(source, "state_family"):
        old = source.block_state
        check_same(
            with_shapes(state.paths, state.variables),
            with_shapes(old.paths, old.variables),
        )
        check_matrices(state, old)
        values = values_by_weight(old)
        old_partitions = old.partitions
    else:
        values = values_of_adam(source, state)
        old_partitions = tuple(
            p and Partition(p.shape, (1,) * len(p.shape))
            for p in state.partitions
        )
    names = set(state.names)
    if values.keys() != names:
        raise ValueError(
            "`source` and `target` must have the same kinds of state. "
            f"Received: {sorted(values)} in source and {sorted(names)} in "
            "target."
        )
    return values, old_partitions


def values_of_adam(
    source: keras.optimizers.Optimizer, state: Storage
) -> Values:
    """The state of Keras's Adam, by the names that Keras gives it."""
    values: Values = {}
    indices = [i for i, p in enumerate(state.partitions) if p is not None]
    for name in ("momentum", "velocity", "velocity_hat"):
        found = [v for v in source.variables if v.name.endswith(f"_{name}")]
        if not found:
            continue
        names = [f"{state.paths[i]}_{name}".replace("/", "_") for i in indices]
        check_same(
            with_shapes(names, [state.variables[i] for i in indices]),
            with_shapes([v.name for v in found], found),
        )
        values[name] = dict(zip(indices, (v.numpy() for v in found)))
    return values


def with_shapes(
    names: Sequence[str], variables: Sequence[Variable]
) -> list[str]:
    return [f"{name} {tuple(v.shape)}" for name, v in zip(names, variables)]


def check_same(expected: Sequence[str], received: Sequence[str]) -> None:
    for path, other in itertools.zip_longest(expected, received):
        if path != other:
            raise ValueError(
                "`source` must be built on the variables of `target`, in the "
                f"same order: {path!r}. Received: {other!r}."
            )


def check_matrices(state: Storage, old: Storage) -> None:
    """Of a matrix, the state is that of its orthogonal directions.

    Second moments that are matrices are those of one basis.
    """
    by_moments = state.rule.matrix_moments is not None
    for path, ours, theirs, p, q in zip(
        state.paths,
        state.has_matrices,
        old.has_matrices,
        state.partitions,
        old.partitions,
    ):
        if by_moments and (ours or theirs) and p != q:
            raise ValueError(
                f"The blocks of variable {path!r} must be the same in `source` "
                "and `target`, since their second moments are matrices. "
                f"Received: blocks of {q and q.block_shape} in source, of "
                f"{p and p.block_shape} in target."
            )
        if ours != theirs:
            owner = "target" if ours else "source"
            raise ValueError(
                "`source` and `target` must have the same hidden matrices and "
                f"output layer. Received: variable {path!r}, a hidden matrix "
                f"in {owner} alone. Give `output_layer` to both."
            )


def check_nesting(
    paths: Sequence[str],
    old: Sequence[Partition | None],
    new: Sequence[Partition | None],
) -> None:
    sharers = [sharers_of(partitions) for partitions in (old, new)]
    for i, (path, p, q) in enumerate(zip(paths, old, new)):
        if p is None or q is None or q.block_shape is None:
            continue
        theirs, ours = sharers[0][i], sharers[1][i]
        sizes = list(zip(p.tile, q.tile))
        if p.block_shape is None or not (
            (all(m % n == 0 for n, m in sizes) and theirs <= ours)
            or (all(n % m == 0 for n, m in sizes) and ours <= theirs)
        ):
            raise ValueError(
                f"The blocks of variable {path!r} in `target` must be made of "
                "those in `source`, or the other way round. Received: blocks "
                f"of {p.block_shape} in source (shared by {len(theirs)} "
                f"variables), of {q.block_shape} in target (by {len(ours)})."
            )


def sharers_of(
    partitions: Sequence[Partition | None],
) -> list[set[int]]:
    """For each variable, those that have the same accumulator."""
    keys = accumulator_keys(partitions)
    return [{j for j, k in enumerate(keys) if k == key} for key in keys]


def to_blocks(
    values: dict[int, Array],
    old: Sequence[Partition | None],
    new: Sequence[Partition | None],
) -> dict[int, Array]:
    """Statistics of the old blocks as those of the new ones."""
    sums: dict[Any, Array] = {}
    sizes: dict[Any, int] = {}
    keys = {}
    new_keys = accumulator_keys(new)
    for i, value in values.items():
        p, q = old[i], new[i]
        if p is None or q is None or q.block_shape is None:
            continue
        x = np.float64(value).ravel()[p.blocks]
        for axis, n in enumerate(q.tile):
            x = np.add.reduceat(x, np.arange(0, x.shape[axis], n), axis)
        keys[i] = new_keys[i]
        sums[keys[i]] = sums.get(keys[i], 0.0) + x.reshape(q.accumulator_shape)
        sizes[keys[i]] = sizes.get(keys[i], 0) + q.block_size
    return {i: sums[key] / sizes[key] for i, key in keys.items()}


def counters(
    source: keras.optimizers.Optimizer, target: keras.optimizers.Optimizer
) -> list[tuple[Variable, Array]]:
    """Keras's own variables that both have, but for the learning rate."""
    kinds = ("iteration", "skipped_steps", "_average", "_gradient_accumulator")
    assignments = []
    for kind in kinds:
        ours = [v for v in target.variables if v.name.endswith(kind)]
        theirs = [v for v in source.variables if v.name.endswith(kind)]
        if kind == "_average" and not theirs:
            # The weights start an average, as they do in Keras's first step.
            theirs = [
                v
                for v in target.block_state.variables
                if not target.has_no_update(v)
            ]
        assignments += [(v, other.numpy()) for v, other in zip(ours, theirs)]
    return assignments
