"""What got which blocks, and what the state of the optimizer costs."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_blockwise.blocking.axes import Weight
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.optimizer import BlockwiseOptimizer
from keras_blockwise.state.slots import ITEM_SIZES
from keras_blockwise.tables import lines_of
from keras_blockwise.tables import table_of
from keras_blockwise.tables import to_text

# As many lines as a person reads; more variables are folded by layer.
MAX_LINES = 40


@dataclass(frozen=True)
class SummaryRow:
    """The blocks of one variable.

    Args:
        path: Path of the variable.
        layer: Path of the layer that owns it.
        shape: Its shape.
        source: The scheme, the tuple or the rule that made its blocks.
        block_shape: Shape of one block; `None` if there are no blocks.
        num_blocks: Number of blocks; 0 where an earlier variable of its group
            counts the one they share.
        group: Name of the accumulator it shares with others, or `None`.
        state_bytes: Bytes of the state that belongs to it.
        adam_bytes: Bytes of the state that `keras.optimizers.Adam` would have.
        multiplier: Factor of its learning rate; `None` if the optimizer has no
            `learning_rate_multipliers`.
        momentum_dtype: Dtype of its momentum; `None` if it has none.
    """

    path: str
    layer: str
    shape: Shape
    source: str
    block_shape: Shape | None
    num_blocks: int
    group: str | None
    state_bytes: int
    adam_bytes: int
    multiplier: float | None = None
    momentum_dtype: str | None = None


@dataclass(frozen=True)
class Summary:
    """What got which blocks: data in `rows`, a table when printed.

    Args:
        optimizer: Name of the optimizer's class.
        rows: One `SummaryRow` per variable.
    """

    optimizer: str
    rows: tuple[SummaryRow, ...]

    @property
    def num_blocks(self) -> int:
        return sum(row.num_blocks for row in self.rows)

    @property
    def state_bytes(self) -> int:
        return sum(row.state_bytes for row in self.rows)

    @property
    def adam_bytes(self) -> int:
        return sum(row.adam_bytes for row in self.rows)

    def __str__(self) -> str:
        """A table of at most 100 columns; long models are folded by layer."""
        sources = sorted({row.source for row in self.rows})
        title = f"{self.optimizer}, blocks by {' and '.join(sources)}"
        columns = ["shape", "block", "blocks", "state"]
        multiplied = any(row.multiplier is not None for row in self.rows)
        if multiplied:
            columns.append("rate")
        dtypes = {row.momentum_dtype for row in self.rows}
        if dtypes - {None, "float32"}:
            columns.append("momentum")
        table = table_of(title, "variable", columns)
        if len(sources) > 1:
            table.add_column("blocks by", overflow="fold")
        for top, lines in fold(self.rows):
            if top:
                table.add_row(top)
            for name, rows in lines:
                num_blocks = sum(row.num_blocks for row in rows)
                cells = [
                    f"  {name}" if top else name,
                    the_only({str(row.shape) for row in rows}),
                    the_only({block_of(row) for row in rows}),
                    f"{num_blocks:,}" if num_blocks else none_of(rows),
                    to_text(sum(row.state_bytes for row in rows)),
                ]
                if multiplied:
                    rates = {f"x {row.multiplier:.3g}" for row in rows}
                    cells.append(the_only(rates))
                if dtypes - {None, "float32"}:
                    cells.append(
                        the_only({row.momentum_dtype or "-" for row in rows})
                    )
                cells.append(the_only({row.source for row in rows}))
                table.add_row(*cells[: len(table.columns)])
        total = (
            f"{len(self.rows)} variables in {self.num_blocks:,} blocks; state "
            f"{to_text(self.state_bytes)}, "
            f"{self.state_bytes / max(self.adam_bytes, 1):.1%} of the "
            f"{to_text(self.adam_bytes)} of Adam"
        )
        return "\n".join([*lines_of(table), total])


def summary(optimizer: BlockwiseOptimizer | keras.Model) -> Summary:
    """Tells which blocks every variable has, and what the state costs.

    Args:
        optimizer: A built optimizer of this package, or a built model that is
            compiled with one.

    Returns:
        A `Summary`: `rows` and totals as data, and a table when printed.

    Raises:
        ValueError: If the optimizer or the model is not built.
        TypeError: If there is no optimizer of this package.

    Example:

    ```python
    model.compile(optimizer=kb.BlockAdam(3e-3), loss="mse")
    print(kb.summary(model))
    ```
    """
    optimizer, variables = with_variables(optimizer)
    variables, rows, slots = optimizer.planned(variables)
    multipliers = optimizer.planned_multipliers(variables, rows)
    state_bytes = [0] * len(rows)
    momentum_dtypes = {}
    for slot in slots:
        state_bytes[slot.index] += slot.num_bytes
        if slot.name == "momentum":
            momentum_dtypes[slot.index] = slot.dtype
    counted = set()
    lines = []
    for i, (variable, row, num_bytes, multiplier) in enumerate(
        zip(variables, rows, state_bytes, multipliers)
    ):
        if row is None:
            continue
        weight = Weight.of(variable)
        partition = row.partition
        group = partition.group
        dtype = keras.backend.standardize_dtype(variable.dtype)
        lines.append(
            SummaryRow(
                path=weight.path,
                layer=row.layer,
                shape=partition.shape,
                source=row.source,
                block_shape=partition.block_shape,
                num_blocks=0 if group in counted else partition.num_blocks,
                group=group,
                state_bytes=num_bytes,
                adam_bytes=2 * math.prod(partition.shape) * ITEM_SIZES[dtype],
                multiplier=multiplier,
                momentum_dtype=momentum_dtypes.get(i),
            )
        )
        if group is not None:
            counted.add(group)
    return Summary(type(optimizer).__name__, tuple(lines))


def with_variables(
    optimizer: Any,
) -> tuple[BlockwiseOptimizer, Sequence[Any] | None]:
    """An optimizer of this package, and the variables of its model, if any."""
    variables = None
    if isinstance(optimizer, keras.Model):
        model, optimizer = optimizer, getattr(optimizer, "optimizer", None)
        if not model.built:
            raise ValueError(
                "`optimizer` must be a built optimizer or a built model. "
                f"Received: the model {model.name!r}, which has no variables "
                "yet. Call it once, or `model.build(input_shape)`."
            )
        variables = model.trainable_variables
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, BlockwiseOptimizer):
        raise TypeError(
            "`optimizer` must be an optimizer of keras_blockwise, or a model "
            f"that is compiled with one. Received: {optimizer!r}."
        )
    return optimizer, variables


Line = tuple[str, list[SummaryRow]]


def fold(rows: Sequence[SummaryRow]) -> list[tuple[str, list[Line]]]:
    """Rows on lines, lines under the layer that several have in common.

    More variables than a person reads are folded: layers that are alike but
    for the numbers in their paths are on one line.
    """
    folded: dict[tuple[str, int], list[SummaryRow]] = {}
    for i, row in enumerate(rows):
        if len(rows) > MAX_LINES:
            key = re.sub(r"\d+", "*", row.path), 0
        else:
            key = row.path, i  # Paths need not be unique.
        folded.setdefault(key, []).append(row)
    blocks = []
    for top, block in itertools.groupby(
        folded.items(), key=lambda item: item[0][0].partition("/")[0]
    ):
        lines = list(block)
        counts = {len(members) for _, members in lines}
        if len(lines) > 1 and len(counts) == 1:
            names = [path.partition("/")[2] for (path, _), _ in lines]
            head = top + times(counts.pop())
        else:
            names = [
                (members[0].path if len(members) == 1 else path)
                + times(len(members))
                for (path, _), members in lines
            ]
            head = ""
        blocks.append(
            (head, list(zip(names, (members for _, members in lines))))
        )
    return blocks


def block_of(row: SummaryRow) -> str:
    return "-" if row.block_shape is None else str(row.block_shape)


def none_of(rows: Sequence[SummaryRow]) -> str:
    """Why there are no blocks of their own."""
    return "-" if all(row.group is None for row in rows) else "shared"


def times(count: int) -> str:
    return f" (x{count})" if count > 1 else ""


def the_only(values: set[str]) -> str:
    return next(iter(values)) if len(values) == 1 else "various"
