"""Saving and loading: everything is checked before anything is assigned."""

import inspect
import itertools
import json
import warnings
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any
from typing import NamedTuple

import keras
import numpy as np

from keras_blockwise.blocking.axes import Weight
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.state.slots import Slot
from keras_blockwise.state.storage import slot_name

Variable = Any
Optimizer = Any

# Kinds of the variables that an optimizer has before it is built.
INITIAL = {"iteration", "learning_rate", "skipped_steps"}
# The kind of a variable that a subclass has added, before or after.
ADDED = "a variable of a subclass"
# Stands before the dtype of a momentum.
IN = " in "
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


def save(optimizer: Optimizer, store: Any) -> None:
    """Saves the state, each slot by itself, and the name of each."""
    base = (variable.numpy() for variable in base_variables(optimizer))
    slots = optimizer.block_state.values() if optimizer.built else ()
    for i, value in enumerate(itertools.chain(base, slots)):
        store[str(i)] = value
    # Keras saves by position alone; names make a mix-up detectable.
    kinds = [entry.kind for entry in layout_of(optimizer)]
    names = json.dumps([type(optimizer).__name__, *kinds])
    store["names"] = np.frombuffer(names.encode(), np.uint8)


def load(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Loads what `save` has saved from a built optimizer.

    Raises:
        ValueError: If the state is that of another optimizer, another
            blocking or other variables. None of it has been loaded then.
    """
    names = saved.pop("names", None)
    name, *kinds = ["another optimizer"] if names is None else decode(names)
    check_class(optimizer, name)
    values = [saved[str(i)] for i in range(len(kinds))]
    received = [(k, tuple(value.shape)) for k, value in zip(kinds, values)]
    positions = check_layout(layout_of(optimizer), received)
    variables = base_variables(optimizer)
    for position, value in zip(positions, values):
        if position < len(variables):
            variables[position].assign(value)
    if len(values) > len(variables):
        optimizer.block_state.assign(values[len(variables) :])


def describe(optimizer: Optimizer) -> str:
    """What a checkpoint by position says of the state beside it."""
    layout = [(entry.kind, entry.shape) for entry in layout_of(optimizer)]
    return json.dumps([type(optimizer).__name__, layout])


def check_description(
    optimizer: Optimizer, description: str
) -> list[tuple[str, Shape]]:
    """Raises an error if the state of a checkpoint does not fit.

    Args:
        optimizer: The optimizer that is to be restored.
        description: What `describe` returned for the one that was saved.

    Returns:
        Kind and shape of each variable that was saved.
    """
    name, layout = json.loads(description)
    check_class(optimizer, name)
    received = [(kind, tuple(shape)) for kind, shape in layout]
    if optimizer.built:
        check_layout(layout_of(optimizer), received)
    return received


def foreign_checkpoint(optimizer: Optimizer) -> str:
    """What is wrong if a checkpoint has nothing that `describe` has said."""
    name = type(optimizer).__name__
    return (
        f"A `tf.train.Checkpoint` that is restored into {name} must have been "
        f"saved with a {name}. Received: the state of another optimizer. Its "
        "step count, and what else has the same position, has been taken for "
        f"this one: make a new {name}. To go on from that state, restore it "
        "with the optimizer that was saved, and use `convert_state`, or take "
        "`model.get_weights()` alone."
    )


def loads_a_model() -> bool:
    """Whether this is within `keras.models.load_model`."""
    frame = inspect.currentframe()
    while frame and frame.f_code is not keras.models.load_model.__code__:
        frame = frame.f_back
    return frame is not None


@contextmanager
def no_obstacle(optimizer: Optimizer) -> Iterator[None]:
    """Makes an error a warning where a whole model is loaded.

    It is of more use with a new state of its optimizer than not at all.
    """
    try:
        yield
    except ValueError as error:
        if not loads_a_model():
            raise
        warnings.warn(
            "The model is loaded without the state of its optimizer: compile "
            f"it with a new {type(optimizer).__name__}, or go on without that "
            f"state where it can be built. {error}",
            stacklevel=2,
        )


def base_variables(optimizer: Optimizer) -> list[Variable]:
    """All that are not slots: of Keras's base class, and of a subclass."""
    slots = optimizer.block_state.slot_variables if optimizer.built else ()
    own = {id(variable) for variable in slots}
    return [v for v in optimizer.variables if id(v) not in own]


def layout_of(optimizer: Optimizer) -> list[Entry]:
    """What the optimizer saves, in order."""
    kinds = optimizer.base_kinds
    layout = [
        Entry(v.name, kinds.get(id(v), ADDED), tuple(v.shape))
        for v in base_variables(optimizer)
    ]
    if not optimizer.built:
        return layout
    state = optimizer.block_state
    return layout + slot_entries(state.variables, state.slots)


def check_planned(
    optimizer: Optimizer, variables: Sequence[Variable], slots: Sequence[Slot]
) -> None:
    """Raises an error if `build` will not make what a checkpoint has."""
    # A subclass may make its variables before or after the slots.
    check_layout(
        [
            entry
            for entry in planned_layout(optimizer, variables, slots)
            if entry.kind != ADDED
        ],
        [saved for saved in optimizer.restored_layout if saved[0] != ADDED],
    )


def planned_layout(
    optimizer: Optimizer, variables: Sequence[Variable], slots: Sequence[Slot]
) -> list[Entry]:
    """What `layout_of` will be when `build` is done."""
    weights = [Weight.of(variable) for variable in variables]
    base = []
    if optimizer.use_ema:
        base += [
            (weight, "average")
            for weight, variable in zip(weights, variables)
            if not optimizer.has_no_update(variable)
        ]
    if optimizer.gradient_accumulation_steps:
        base += [(weight, "gradient_accumulator") for weight in weights]
    kind = "learning_rate_multipliers"
    given = optimizer.learning_rate_multipliers is not None
    return [
        *layout_of(optimizer),
        *(Entry(f"{w.path}_{kind}", kind, w.shape) for w, kind in base),
        *[Entry(kind, kind, (len(weights),))] * given,
        *slot_entries(variables, slots),
    ]


def slot_entries(
    variables: Sequence[Variable], slots: Sequence[Slot]
) -> list[Entry]:
    """The slots as they are known in a saved state."""
    weights = [Weight.of(variable) for variable in variables]
    return [
        Entry(
            slot_name(weights[slot.index], slot),
            f"{weights[slot.index].name}/{slot.name}"
            + dtype_of(slot, variables[slot.index]),
            slot.shape,
        )
        for slot in slots
    ]


def dtype_of(slot: Slot, variable: Variable) -> str:
    """What a kind says of the dtype of a momentum."""
    if slot.name != "momentum":
        return ""
    own = keras.backend.standardize_dtype(variable.dtype)
    return IN + ("the dtype of the weight" if slot.dtype == own else slot.dtype)


def check_class(optimizer: Optimizer, name: str) -> None:
    own_name = type(optimizer).__name__
    if name != own_name:
        raise ValueError(
            f"The saved state must be one of {own_name}. Received: the "
            f"state of {name}. {REMEDY}"
        )


def check_layout(
    own: Sequence[Entry], received: Sequence[tuple[str, Shape]]
) -> list[int]:
    """Raises an error if a saved state is not that of the own variables.

    Args:
        own: The variables of the optimizer.
        received: Kind and shape of each that was saved.

    Returns:
        The positions of the own variables that were saved.
    """
    positions = list(range(len(own)))
    unbuilt = {*INITIAL, ADDED}
    if unbuilt.issuperset(kind for kind, _ in received):
        positions = [i for i in positions if own[i].kind in unbuilt]
        while (
            len(positions) > len(received) and own[positions[-1]].kind == ADDED
        ):
            positions.pop()  # A subclass adds it in `build`.
    own = [own[i] for i in positions]
    for entry, (kind, shape) in zip(own, received):
        if entry.kind != kind and same_but_dtype(entry.kind, kind):
            if IN in kind or entry.kind.endswith("int8"):
                raise ValueError(
                    "The saved state must have the `momentum_dtype` of this "
                    f"optimizer. {entry.name!r} is {entry.kind}. Received: "
                    f"{kind}. {REMEDY} `convert_state` copies the state of an "
                    "optimizer with the `momentum_dtype` that was saved."
                )
            kind = entry.kind  # Of a version that did not save the dtype.
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
    return positions


def same_but_dtype(kind: str, other: str) -> bool:
    """Whether two kinds are the momentum of one weight."""
    return kind.partition(IN)[0] == other.partition(IN)[0]


def decode(names: Any) -> list[str]:
    decoded: list[str] = json.loads(bytes(np.asarray(names)))
    return decoded


@contextmanager
def all_or_nothing(model: keras.Model) -> Iterator[None]:
    """Undoes a loading that fails.

    Keras loads the weights of a model before the state of its optimizer, so a
    file whose optimizer does not fit, or that ends too early, leaves a mixture
    behind. Within this context an error leaves every weight and every state
    variable as it was. The values are kept in host memory meanwhile.

    Args:
        model: The model that is loaded into.

    Raises:
        BaseException: That of what is within the context.

    Example:

    ```python
    with kb.all_or_nothing(model):
        model.load_weights("model.weights.h5")
    ```
    """
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    values = [(variable, variable.numpy()) for variable in variables]
    try:
        yield
    except BaseException:
        for variable, value in values:
            variable.assign(value)
        raise
