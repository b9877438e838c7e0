"""What each optimizer would need to train a model, before there is one."""

import inspect
import math
import re
import textwrap
import warnings
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_blockwise import optimizers as named
from keras_blockwise.blocking.blocking import Blocking
from keras_blockwise.optimizer import BlockwiseOptimizer
from keras_blockwise.tables import WIDTH
from keras_blockwise.tables import lines_of
from keras_blockwise.tables import table_of
from keras_blockwise.tables import to_text
from keras_blockwise.validation import is_number

# Those of Keras whose `build` adds variables, and does nothing else.
KERAS = (
    keras.optimizers.Adadelta,
    keras.optimizers.Adafactor,
    keras.optimizers.Adagrad,
    keras.optimizers.Adam,
    keras.optimizers.AdamW,
    keras.optimizers.Adamax,
    keras.optimizers.Ftrl,
    keras.optimizers.Lamb,
    keras.optimizers.Lion,
    keras.optimizers.Muon,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
    keras.optimizers.SGD,
)
MOMENTUM_DTYPES = ("bfloat16", "int8")
# What is compared by default.
DEFAULTS: list[tuple[Any, dict[str, Any]]] = [
    (keras.optimizers.SGD, {}),
    (keras.optimizers.SGD, {"momentum": 0.9}),
    (keras.optimizers.Adagrad, {}),
    (keras.optimizers.RMSprop, {}),
    (keras.optimizers.Adafactor, {}),
    (keras.optimizers.Lion, {}),
    (keras.optimizers.Muon, {}),
    (keras.optimizers.Adam, {}),
    (keras.optimizers.AdamW, {}),
    (keras.optimizers.Nadam, {}),
    (named.BlockAdam, {}),
    (named.AdamMini, {}),
    (named.Adalayer, {}),
    (named.BlockNadam, {}),
    (named.BAGM, {}),
    (named.BlockMuon, {}),
    (named.BAG, {}),
    (named.BlockRMSprop, {}),
    (named.BCOS, {}),
    (named.AdaBlock, {}),
    (named.SPAM, {}),
    *(
        (cls, {"momentum_dtype": dtype})
        for dtype in MOMENTUM_DTYPES
        for cls in (named.BlockAdam, named.AdamMini, named.BAGM)
    ),
]
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?))?b", re.IGNORECASE)
# Parameters that are no arguments, or make no difference here.
OTHERS = {"args", "kwargs", "learning_rate", "name"}
# Arguments that are longer are not shown.
LONG = 40


@dataclass(frozen=True)
class PlanRow:
    """The bytes that training with one optimizer would need.

    Args:
        optimizer: Its class, and the arguments that are not the defaults.
        weight_bytes: Bytes of all variables of the model.
        gradient_bytes: Bytes of one gradient per trainable variable.
        state_bytes: Bytes of all variables of the optimizer.
        fits: Whether all of these are within the budget; `None` without one.
    """

    optimizer: str
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    fits: bool | None = None

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.state_bytes


@dataclass(frozen=True)
class Plan:
    """What each optimizer would need: data in `rows`, a table when printed.

    Args:
        model: Name of the model.
        rows: One `PlanRow` per optimizer, in the order of the optimizers.
        adam_bytes: Bytes of the state that `keras.optimizers.Adam` would have.
        budget: The size that was given, if any.
    """

    model: str
    rows: tuple[PlanRow, ...]
    adam_bytes: int
    budget: str | float | None = None

    def __str__(self) -> str:
        """A table of at most 100 columns, from the least total on.

        In GB and the like if the budget was given so, else in GiB.
        """
        budget = self.budget
        base = 1024 if budget is None else parsed(budget)[1]
        columns = ["weights", "gradients", "state", "of Adam's", "total"]
        columns += ["fits"] * (budget is not None)
        table = table_of(f"To train {self.model!r}", "optimizer", columns)
        for row in sorted(self.rows, key=lambda row: row.total_bytes):
            cells = [
                row.optimizer,
                to_text(row.weight_bytes, base),
                to_text(row.gradient_bytes, base),
                to_text(row.state_bytes, base),
                f"{row.state_bytes / self.adam_bytes:.1%}",
                to_text(row.total_bytes, base),
                "yes" if row.fits else "no",
            ]
            table.add_row(*cells[: len(table.columns)])
        lines = [
            *lines_of(table),
            "Activations and the temporaries of the backend come on top.",
        ]
        if budget is not None:
            size = budget if isinstance(budget, str) else to_text(budget)
            lines += textwrap.wrap(self._verdict(size.strip(), base), WIDTH)
        return "\n".join(lines)

    def _verdict(self, size: str, base: int) -> str:
        """What fits: of each class, the plainest that does."""
        least = min(self.rows, key=lambda row: row.total_bytes)
        if all(row.fits for row in self.rows):
            return f"All of these fit in {size}."
        if not least.fits:
            total = to_text(least.total_bytes, base)
            name = least.optimizer
            return f"None fits in {size}: the least, {name}, needs {total}."
        plainest: dict[str, PlanRow] = {}
        for row in self.rows:
            if row.fits:
                plainest.setdefault(row.optimizer.partition("(")[0], row)
        chosen = sorted(plainest.values(), key=lambda row: row.total_bytes)
        names = ", ".join(row.optimizer for row in chosen)
        return f"Fit in {size}: {names}."


def plan(
    model: keras.Model,
    optimizers: Sequence[keras.optimizers.Optimizer] | None = None,
    budget: str | float | None = None,
) -> Plan:
    """Tells how much memory training a model would need, by optimizer.

    That of the weights, of one gradient per trainable weight and of the state
    of the optimizer, on all devices together. The activations, which grow with
    the batch, and the temporaries of the backend come on top, and can need
    more than all of this. The model need not be compiled. It stays as it is,
    and nothing of these sizes is allocated.

    Args:
        model: A built model.
        optimizers: A list of optimizers of this package or of Keras, none of
            them built. Defaults to `None`: all of this package and the usual
            ones of Keras.
        budget: What there is: a number of bytes, or a size such as `"24GB"`
            (of 1000^3 bytes) or `"16 GiB"` (of 1024^3). Defaults to `None`.

    Returns:
        A `Plan`: `rows` as data, and a table when printed, which marks what
        fits into the budget.

    Raises:
        ValueError: If the model is not built, an optimizer is, or `budget` is
            no size; or what `build` of an optimizer would raise.
        TypeError: If `model` is no `keras.Model`, or `optimizers` is no list
            of optimizers that are known here.

    Example:

    ```python
    print(kb.plan(model, budget="24GB"))
    optimizer = kb.BlockAdam(gradient_accumulation_steps=4)
    print(kb.plan(model, [optimizer, keras.optimizers.Adam()]))
    ```
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r}."
        )
    if not model.built:
        raise ValueError(
            f"`model` must be built. Received: the model {model.name!r}, which "
            "has no variables yet. Call it once, or `model.build(input_shape)`."
        )
    limit = None if budget is None else parsed(budget)[0]
    variables = model.trainable_variables
    weights, gradients = num_bytes(model.variables), num_bytes(variables)
    with warnings.catch_warnings():
        if optimizers is None:
            # With a name, for Keras counts those that it gives.
            optimizers = [
                cls(name="plan", **kwargs) for cls, kwargs in DEFAULTS
            ]
            warnings.simplefilter("ignore")  # `build` will give them.
        check_optimizers(optimizers)
        states = [state_bytes(optimizer, variables) for optimizer in optimizers]
    rows = [
        PlanRow(
            label_of(optimizer),
            weights,
            gradients,
            state,
            None if limit is None else weights + gradients + state <= limit,
        )
        for optimizer, state in zip(optimizers, states)
    ]
    adam = keras.optimizers.Adam(name="plan")
    return Plan(model.name, tuple(rows), state_bytes(adam, variables), budget)


def check_optimizers(optimizers: Any) -> None:
    if not isinstance(optimizers, list | tuple) or not optimizers:
        raise TypeError(
            "`optimizers` must be a list of one or more optimizers. Received: "
            f"optimizers={optimizers!r}."
        )
    for optimizer in optimizers:
        if not isinstance(optimizer, (BlockwiseOptimizer, *KERAS)):
            names = ", ".join(cls.__name__ for cls in KERAS)
            raise TypeError(
                "`optimizers` must be optimizers of keras_blockwise, or of "
                f"these classes of Keras: {names}. Received: {optimizer!r}."
            )
        if optimizer.built:
            raise ValueError(
                "`optimizers` must not be built. Received: "
                f"{label_of(optimizer)}, which is. Make a new one with the "
                "same arguments."
            )


def state_bytes(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[Any]
) -> int:
    """Bytes of all variables that an optimizer would have once it is built."""
    own = num_bytes(optimizer.variables)
    if isinstance(optimizer, BlockwiseOptimizer):
        rows, slots = optimizer.plan(variables)
        own += sum(slot.num_bytes for slot in slots)
        multipliers = optimizer.planned_multipliers(variables, rows)
        own += 4 * sum(factor is not None for factor in multipliers)
        # With what Keras adds for every optimizer, and nothing else.
        copy = keras.optimizers.SGD(
            use_ema=optimizer.use_ema,
            gradient_accumulation_steps=optimizer.gradient_accumulation_steps,
            name="plan",
        )
    else:
        # Not by its config, which not every learning rate can be in.
        given = {k: value for k, (value, _) in arguments_of(optimizer).items()}
        copy = type(optimizer)(0.0, name="plan", **given)
    return own + added_bytes(copy, variables)


def added_bytes(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[Any]
) -> int:
    """Bytes of what an optimizer of Keras adds in `build`.

    It is given symbols instead of variables. Those it makes by itself are
    scalars.
    """
    symbols = []

    def add_variable(
        shape: Sequence[int],
        initializer: Any = "zeros",
        dtype: str | None = None,
        aggregation: str = "none",
        layout: Any = None,
        name: str | None = None,
    ) -> keras.KerasTensor:
        symbols.append(keras.KerasTensor(shape, dtype, name=name or "state"))
        return symbols[-1]

    before = len(optimizer.variables)
    optimizer.add_variable = add_variable
    optimizer.build(variables)
    return num_bytes(symbols + optimizer.variables[before:])


def num_bytes(variables: Iterable[Any]) -> int:
    return sum(
        math.prod(variable.shape)
        * np.dtype(keras.backend.standardize_dtype(variable.dtype)).itemsize
        for variable in variables
    )


def label_of(optimizer: keras.optimizers.Optimizer) -> str:
    """The class, and the arguments that are not the defaults."""
    given = []
    for name, (value, default) in arguments_of(optimizer).items():
        if isinstance(value, Blocking) and not value.rules:
            value = value.scheme
        # Muon has an empty list where `None` was given.
        if value not in (default, []):
            text = repr(value)
            given.append(f"{name}={text if len(text) < LONG else '...'}")
    name = type(optimizer).__name__
    return f"{name}({', '.join(given)})" if given else name


def arguments_of(
    optimizer: keras.optimizers.Optimizer,
) -> dict[str, tuple[Any, Any]]:
    """Of each argument of the constructor, what it is, and the default.

    But for the learning rate. Optimizers have them as attributes.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for base in map(vars, type(optimizer).__mro__):
        if "__init__" in base:
            _, *own = inspect.signature(base["__init__"]).parameters.values()
            for argument in own:
                name, default = argument.name, argument.default
                if name not in {*found, *OTHERS}:
                    found[name] = getattr(optimizer, name, default), default
    return found


def parsed(budget: Any) -> tuple[float, int]:
    """A size in bytes, and how many of its unit are the next larger one."""
    size, base = budget, 1024
    if isinstance(budget, str) and (found := SIZE.fullmatch(budget.strip())):
        number, prefix, binary = found.groups()
        base = 1024 if binary else 1000
        size = float(number) * base ** " kmgt".index((prefix or " ").lower())
    if not is_number(size) or not 0 < size < math.inf:
        raise ValueError(
            "`budget` must be a number of bytes > 0, or a size such as '24GB' "
            "(of 1000^3 bytes) or '16 GiB' (of 1024^3). Received: "
            f"budget={budget!r}."
        )
    return size, base
