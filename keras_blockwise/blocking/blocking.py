"""Which blocks every variable gets: a scheme, rules for exceptions, a table."""

import dataclasses
import warnings
import weakref
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import NamedTuple

import keras

from keras_blockwise.blocking.axes import Meaning
from keras_blockwise.blocking.axes import Weight
from keras_blockwise.blocking.config import is_bool
from keras_blockwise.blocking.config import is_list
from keras_blockwise.blocking.config import is_mapping
from keras_blockwise.blocking.config import is_shape
from keras_blockwise.blocking.config import is_string
from keras_blockwise.blocking.config import read
from keras_blockwise.blocking.inference import infer
from keras_blockwise.blocking.layer_axes import meanings_in
from keras_blockwise.blocking.matching import check_key
from keras_blockwise.blocking.matching import match_keys
from keras_blockwise.blocking.matrices import matrices_of
from keras_blockwise.blocking.matrices import output_positions
from keras_blockwise.blocking.partition import Matrices
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.blocking.partition import Shape
from keras_blockwise.blocking.schemes import GROUPS
from keras_blockwise.blocking.schemes import IN_OUTPUT_LAYER
from keras_blockwise.blocking.schemes import SCHEMES

Tile = tuple[int | None, ...]

AXES = "a list of integers >= 0"


class Row(NamedTuple):
    """The blocks of one variable, and where they come from.

    Args:
        name: Name of the variable, the last part of its path.
        layer: Path of the layer that owns it.
        kind: What the variable is; see `Axes`.
        source: The scheme, tuple or rule that made the blocks.
        partition: The blocks.
        matrices: What it is as hidden matrices; `None` if it is none, or
            belongs to the output layer.
    """

    name: str
    layer: str
    kind: str
    source: str
    partition: Partition
    matrices: Matrices | None = None

    def alone(self) -> "Row":
        """The same without a `group`."""
        partition = dataclasses.replace(self.partition, group=None)
        return Row(*self[:4], partition, self.matrices)

    def of_output(self) -> "Row":
        """The same, of the output layer: no hidden matrices."""
        return Row(*self[:5])

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layer": self.layer,
            "kind": self.kind,
            "source": self.source,
            "shape": list(self.partition.shape),
            "block_shape": to_json(self.partition.block_shape),
            "group": self.partition.group,
            "matrices": self.matrices
            and {
                "tile": list(self.matrices.tile),
                "rows": list(self.matrices.rows),
            },
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Row":
        def field(name: str, rule: str, is_valid: Callable[[Any], bool]) -> Any:
            return read(config, "a row of a blocking", name, rule, is_valid)

        def string(name: str) -> Any:
            return field(name, "a string", is_string)

        shape = field("shape", "a list of integers >= 0", is_shape)
        block_shape = field(
            "block_shape",
            "a list of integers >= 0 or `None`",
            lambda value: value is None or is_shape(value),
        )
        group = field(
            "group",
            "a string or `None`",
            lambda value: value is None or is_string(value),
        )
        matrices = config.get("matrices")  # Older files have none.
        if matrices is not None:
            tile, rows = (
                tuple(read(matrices, "matrices", name, AXES, is_shape))
                for name in ("tile", "rows")
            )
            matrices = Matrices(tuple(shape), tile, rows)
        return cls(
            string("name"),
            string("layer"),
            string("kind"),
            string("source"),
            Partition(tuple(shape), from_json(block_shape), group),
            matrices,
        )


@dataclass(frozen=True)
class Blocking:
    """Says which coordinates of the weights share one adaptive step size.

    Args:
        scheme: What one block is:

            - `"coordinate"`: one entry; Adam, RMSprop and Adagrad themselves.
            - `"output_unit"`: all weights that feed one output unit, that is
              one neuron, channel or embedding row. Biases and scales: one
              entry. The default.
            - `"input_unit"`: all weights that leave one input unit. Biases and
              scales: the whole vector.
            - `"filter"`: the spatial kernel of one (input, output) pair of a
              convolution; elsewhere as `"output_unit"`.
            - `"head"`: one head of the query, key or value projection of an
              attention layer; elsewhere as `"output_unit"`.
            - `"variable"`: the whole variable.
            - `"layer"`: all variables of one layer.
            - `"model"`: all variables.
            - `"adablock"`: chunks of at most 10 of the weights that leave one
              input unit, the spatial kernels of convolutions, up to 32
              entries, and single entries of the rest.
            - `"none"`: nothing. The variable takes plain steps of the learning
              rate (its second moment is 1, without an epsilon).
            - `"adam_mini"`, `"adalayer"`, `"adalayer_sgd"`: those of `AdamMini`
              and of `Adalayer`.
            - a tuple: the shape of the block, `None` for a whole axis, which
              must fit every variable. `(None, 64)` cuts a matrix into strips
              of 64 columns.
        rules: Exceptions, a mapping from the path of a variable to a scheme
            or a tuple. A key is a path, or else a regular expression that
            matches a whole path.
        table: Set by `from_config`: the blocks of a saved optimizer.
        exact: Set by `from_model`: whether nothing is to be guessed.
        model: Set by `from_model`: a weak reference to the model, since a
            model that holds itself through its optimizer cannot be loaded.
        output_layer: Set by `BlockMuon` and `Adalayer`.

    Raises:
        ValueError, TypeError: If a scheme is unknown, or a tuple or a regular
            expression is malformed.

    Example:

    ```python
    blocking = kb.Blocking("output_unit", rules={r".*/qkv/kernel": (None, 64)})
    optimizer = kb.BlockAdam(3e-3, blocking=blocking)
    ```

    Reference:

    - [Zheng & Kwok, 2019](https://arxiv.org/abs/1905.09899)
    """

    scheme: str | Tile = "output_unit"
    rules: Mapping[str, str | Tile] = field(default_factory=dict)
    table: tuple[Row, ...] | None = field(default=None, repr=False)
    exact: bool = field(default=False, repr=False)
    model: Any = field(default=None, repr=False, compare=False)
    output_layer: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_scheme("`scheme`", self.scheme)
        if not isinstance(self.rules, Mapping | None):
            raise TypeError(
                "`rules` must map paths of variables to schemes or tuples. "
                f"Received: rules={self.rules!r}."
            )
        object.__setattr__(self, "rules", dict(self.rules or {}))
        for pattern, scheme in self.rules.items():
            check_key("A key of `rules`", pattern)
            check_scheme(f"`rules[{pattern!r}]`", scheme)
        if self.output_layer is not None:
            check_key("`output_layer`", self.output_layer)

    @classmethod
    def from_model(
        cls,
        model: keras.Model,
        scheme: str | Tile = "output_unit",
        rules: Mapping[str, str | Tile] | None = None,
    ) -> "Blocking":
        """Blocks that are exact for every layer of a model.

        What the axes of a weight mean is read off the layer that owns it, when
        the optimizer is built. The model may be built later, and is not kept
        alive.

        Args:
            model: The model to be trained.
            scheme: As in `Blocking`.
            rules: As in `Blocking`.

        Returns:
            A `Blocking`.

        Raises:
            ValueError, TypeError: As in `Blocking`; if `model` is not a
                `keras.Model`; if it is built, also if a rule does not fit.

        Example:

        ```python
        blocking = kb.Blocking.from_model(model, "head")
        model.compile(optimizer=kb.BlockAdam(3e-3, blocking=blocking))
        ```
        """
        if not isinstance(model, keras.Model):
            raise TypeError(
                f"`model` must be a `keras.Model`. Received: model={model!r}."
            )
        model_ref = weakref.ref(model)
        return cls(scheme, rules or {}, exact=True, model=model_ref).changed()

    def changed(self, **changes: Any) -> "Blocking":
        """The same with other fields, and the blocks that follow from them."""
        if changes and all(getattr(self, k) == v for k, v in changes.items()):
            return self
        blocking = dataclasses.replace(self, table=None, **changes)
        model = None if self.model is None else self.model()
        if model is None or not model.built:
            return blocking
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `build` will give them.
            table = blocking.resolve(model.trainable_variables)
        return dataclasses.replace(blocking, table=table)

    def resolve(
        self, variables: Sequence[Any], by_matrix: bool = False
    ) -> tuple[Row, ...]:
        """The blocks of each variable, in order.

        Args:
            variables: The trainable variables, with `path` and `shape`.
            by_matrix: Whether matrices take a step of their own. They share no
                accumulator then, and a doubt about them is worth a warning.

        Returns:
            One `Row` per variable.

        Raises:
            ValueError: If a rule matches nothing, two rules match one
                variable, a tile does not fit its variable, or the layers would
                have to be known and are not.
        """
        rows = self._resolve(variables, by_matrix)
        if by_matrix:
            rows = tuple(row.alone() if row.matrices else row for row in rows)
        return rows

    def _resolve(
        self, variables: Sequence[Any], by_matrix: bool
    ) -> tuple[Row, ...]:
        weights = [Weight.of(variable) for variable in variables]
        model = None if self.model is None else self.model()
        if model is not None:
            meanings = meanings_in(model)
            if all(id(variable) in meanings for variable in variables):
                own = [meanings[id(variable)] for variable in variables]
                rows, unknown, output = self._choose(
                    variables, own, model, by_matrix
                )
                if unknown:
                    warnings.warn(
                        UNKNOWN.format(describe(unknown)), stacklevel=3
                    )
                self._warn_of_output(output, by_matrix)
                return rows
        if self.table is not None:
            table = find_rows(self.table, weights)
            if table is not None:
                return table
            misfit = first_misfit(self.table, weights)
        else:
            misfit = ""
        rows, guesses, output = self._choose(
            variables, infer(weights), None, by_matrix
        )
        if guesses and self.exact:
            raise ValueError(NOT_IN_MODEL.format(describe(guesses)))
        if misfit:
            warnings.warn(
                f"The saved blocks do not fit these variables: {misfit}. The "
                f"blocks are chosen anew by {self!r}, and a saved state of the "
                "optimizer will not fit them.",
                stacklevel=3,
            )
        if guesses:
            what = "blocks and matrices" if by_matrix else "blocks"
            warnings.warn(GUESSES.format(what, describe(guesses)), stacklevel=3)
        self._warn_of_output(output, by_matrix)
        return rows

    def _choose(
        self,
        variables: Sequence[Any],
        meanings: Sequence[Meaning],
        model: Any,
        by_matrix: bool,
    ) -> tuple[tuple[Row, ...], list[tuple[str, Row]], list[str]]:
        """The blocks of each variable; which are ambiguous; a guessed output.

        The rows of the output layer have no hidden matrices.
        """
        weights = list(map(Weight.of, variables))
        other_paths = (
            [] if model is None else [v.path for v in model.trainable_variables]
        )
        rules = match_keys("rules", self.rules, weights, other_paths)
        schemes = [
            self.scheme if rule is None else self.rules[rule] for rule in rules
        ]
        matrices = [
            [
                matrices_of(weight.shape, axes, per_head=scheme == "head")
                for axes in meaning.axes
            ]
            for weight, meaning, scheme in zip(weights, meanings, schemes)
        ]
        output, guessed = output_positions(
            variables,
            [meaning.layer for meaning in meanings],
            [meaning.axes[0].kind for meaning in meanings],
            model,
            self.output_layer,
        )
        rows = []
        ambiguous = []
        for i, (weight, meaning) in enumerate(zip(weights, meanings)):
            scheme, rule = schemes[i], rules[i]
            source = str(scheme) if rule is None else f"rule {rule!r}"
            partitions = partitions_of(
                weight, meaning, scheme, source, i in output
            )
            row = Row(
                weight.name,
                meaning.layer,
                meaning.axes[0].kind,
                source,
                partitions[0],
                None if i in output else matrices[i][0],
            )
            rows.append(row)
            unsure = scheme == "layer" and not meaning.sure_of_layer
            unsure |= by_matrix and len(set(matrices[i])) > 1
            if unsure or len(set(partitions)) > 1:
                ambiguous.append((weight.path, row))
        return tuple(rows), ambiguous, guessed

    def _warn_of_output(self, guessed: list[str], by_matrix: bool) -> None:
        """Where it matters which layer makes the output, and that is guessed.

        Args:
            guessed: Paths of the kernels that are taken for the last.
            by_matrix: As in `resolve`.
        """
        schemes = {self.scheme, *self.rules.values()}
        if guessed and by_matrix:
            warnings.warn(OUTPUT.format(guessed, OF_MATRICES), stacklevel=4)
        elif guessed and not schemes.isdisjoint(IN_OUTPUT_LAYER):
            warnings.warn(OUTPUT.format(guessed, OF_BLOCKS), stacklevel=4)

    def get_config(self) -> dict[str, Any]:
        """Plain JSON data from which `from_config` makes an equal object."""
        table = self.table
        return {
            "scheme": to_json(self.scheme),
            "rules": {key: to_json(value) for key, value in self.rules.items()},
            "table": table and [row.get_config() for row in table],
            "exact": self.exact,
            "output_layer": self.output_layer,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Blocking":
        def field(name: str, rule: str, is_valid: Callable[[Any], bool]) -> Any:
            return read(config, "a blocking", name, rule, is_valid)

        scheme = field(
            "scheme",
            "a string or a list",
            lambda value: is_string(value) or is_list(value),
        )
        rules = field("rules", "a mapping", is_mapping)
        table = field(
            "table",
            "a list or `None`",
            lambda value: value is None or is_list(value),
        )
        return cls(
            from_json(scheme),
            {key: from_json(value) for key, value in rules.items()},
            None if table is None else tuple(map(Row.from_config, table)),
            field("exact", "a boolean", is_bool),
            output_layer=config.get("output_layer"),
        )


def check_scheme(argument: str, scheme: Any) -> None:
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise ValueError(
                f"{argument} must be one of {sorted(SCHEMES)} or a tuple. "
                f"Received: {scheme!r}."
            )
    elif not isinstance(scheme, tuple) or not all(
        n is None or (type(n) is int and n > 0) for n in scheme
    ):
        raise TypeError(
            f"{argument} must be a string, or a tuple of positive integers and "
            f"`None` (for a whole axis). Received: {scheme!r}."
        )


def tile_of(weight: Weight, tile: Tile, source: str) -> Shape:
    """The shape of a block that a user wrote."""
    where = f"Blocking {source} -> {tile}, variable {weight.path!r}"
    if len(tile) != len(weight.shape):
        raise ValueError(
            f"{where}: the tuple must have one entry for each axis of the "
            f"shape {weight.shape}. Received: {len(tile)} entries."
        )
    block_shape = tuple(
        max(size, 1) if n is None else n for size, n in zip(weight.shape, tile)
    )
    try:
        Partition(weight.shape, block_shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return block_shape


def partitions_of(
    weight: Weight,
    meaning: Meaning,
    scheme: str | Tile,
    source: str,
    in_output_layer: bool,
) -> list[Partition]:
    """The blocks of a variable, by each meaning that it may have."""
    if not isinstance(scheme, str):
        return [Partition(weight.shape, tile_of(weight, scheme, source))]
    function = SCHEMES[scheme]
    if in_output_layer:
        function = IN_OUTPUT_LAYER.get(scheme, function)
    group = GROUPS[scheme](meaning.layer) if scheme in GROUPS else None
    return [
        Partition(weight.shape, function(weight.shape, axes), group)
        for axes in meaning.axes
    ]


def find_rows(
    table: Sequence[Row], weights: Sequence[Weight]
) -> tuple[Row, ...] | None:
    """The rows of the variables: all in order, or the one that fits each."""
    if first_misfit(table, weights) is None:
        return tuple(table)
    found = []
    for weight in weights:
        layer = weight.layer_path.rpartition("/")[2]
        rows = [
            row
            for row in table
            if (row.name, row.partition.shape) == (weight.name, weight.shape)
            and row.layer.rpartition("/")[2].partition("#")[0] == layer
        ]
        if len(rows) != 1 or rows[0] in found:
            return None
        found += rows
    return tuple(found)


def first_misfit(table: Sequence[Row], weights: Sequence[Weight]) -> str | None:
    """Where the variables differ from those that a table was made for."""
    for i, (row, weight) in enumerate(zip(table, weights)):
        if (row.name, row.partition.shape) != (weight.name, weight.shape):
            return (
                f"variable {i} was {row.name!r} of shape {row.partition.shape} "
                f"and is {weight.path!r} of shape {weight.shape}"
            )
    if len(table) != len(weights):
        return f"there were {len(table)} variables and are {len(weights)}"
    return None


def describe(rows: Sequence[tuple[str, Row]]) -> str:
    lines = []
    for path, row in rows[:10]:
        shared = row.partition.group
        lines.append(
            f"\n  '{path}' of shape {row.partition.shape}: "
            f"blocks of {row.partition.block_shape}"
            + (f", shared in layer {shared!r}" if shared else "")
        )
    if len(rows) > len(lines):
        lines.append(f"\n  and {len(rows) - len(lines)} more")
    return "".join(lines)


GUESSES = (
    "Names and shapes allow more than one choice of {}. Chosen:{}\n"
    "For exact blocks pass `blocking=Blocking.from_model(model, scheme)`, or "
    "give these paths a tuple in `Blocking(scheme, rules=...)`."
)
UNKNOWN = (
    "These variables belong to layers whose axes are not known, and are one "
    "block each:{}\nSay what their axes mean with `register_layer_axes`, or "
    "give their paths a tuple in the `rules` of `Blocking.from_model`."
)
OUTPUT = (
    "The output layer is not known. Taken for it, since it is the last: {}\n"
    "{} Pass `output_layer`, the path of a layer or a regular expression, or "
    "`blocking=Blocking.from_model(model, ...)` with a functional or "
    "sequential model."
)
OF_MATRICES = (
    "Its weights take the step of embeddings and vectors, all other matrices "
    "are orthogonalised."
)
OF_BLOCKS = "Its output units are one block each, as no others are."
NOT_IN_MODEL = (
    "The variables must belong to the model that `Blocking.from_model` was "
    "given: only its layers can tell the blocks. Received:{}\nPass a "
    "`Blocking.from_model` of the model that is trained."
)


def to_json(value: str | Tile | None) -> str | list[int | None] | None:
    return list(value) if isinstance(value, tuple) else value


def from_json(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
