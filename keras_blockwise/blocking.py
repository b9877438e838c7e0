"""Which blocks every variable gets: a scheme, rules for exceptions, a table."""

import re
import warnings
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from keras_blockwise.inference import Meaning
from keras_blockwise.inference import Weight
from keras_blockwise.inference import infer
from keras_blockwise.partition import Partition
from keras_blockwise.schemes import GROUPS
from keras_blockwise.schemes import SCHEMES

Tile = tuple[int | None, ...]
# Name and blocks of every variable of an optimizer, in order.
Table = tuple[tuple[str, Partition], ...]


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
            - `"variable"`: the whole variable.
            - `"layer"`: all variables of one layer.
            - `"model"`: all variables.
            - a tuple: the shape of the block, `None` for a whole axis, which
              must fit every variable. `(None, 64)` cuts a matrix into strips
              of 64 columns.
        rules: Exceptions, a mapping from the path of a variable to a scheme
            or a tuple. A key is a path, or else a regular expression that
            matches a whole path.

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
    # The blocks of a saved optimizer, which `from_config` puts here.
    table: Table | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_scheme("`scheme`", self.scheme)
        if not isinstance(self.rules, Mapping | None):
            raise TypeError(
                "`rules` must map paths of variables to schemes or tuples. "
                f"Received: rules={self.rules!r}."
            )
        object.__setattr__(self, "rules", dict(self.rules or {}))
        for pattern, scheme in self.rules.items():
            check_scheme(f"`rules[{pattern!r}]`", scheme)
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    "A key of `rules` must be the path of a variable or a "
                    f"regular expression ({error}). Received: {pattern!r}."
                ) from error

    def resolve(self, variables: Sequence[Any]) -> tuple[Partition, ...]:
        """The blocks of each variable, in order.

        Args:
            variables: The trainable variables, with `path` and `shape`.

        Returns:
            One `Partition` per variable.

        Raises:
            ValueError: If a rule matches nothing, two rules match one
                variable, or a tile does not fit its variable.
        """
        weights = [Weight.of(variable) for variable in variables]
        if self.table is not None:
            misfit = first_misfit(self.table, weights)
            if misfit is None:
                return tuple(partition for _, partition in self.table)
            warnings.warn(
                f"The saved blocks do not fit these variables: {misfit}. The "
                f"blocks are chosen anew by {self!r}, and a saved state of the "
                "optimizer will not fit them.",
                stacklevel=2,
            )
        return self.choose(weights, infer(weights))

    def choose(
        self, weights: Sequence[Weight], meanings: Sequence[Meaning]
    ) -> tuple[Partition, ...]:
        """The blocks of variables by scheme and rules."""
        partitions = []
        guesses = []
        rules = match_rules(self.rules, weights)
        for weight, meaning, rule in zip(weights, meanings, rules):
            scheme = self.scheme if rule is None else self.rules[rule]
            if not isinstance(scheme, str):
                partitions.append(cut(weight, scheme, rule))
                continue
            tiles = [
                SCHEMES[scheme](weight.shape, axes) for axes in meaning.axes
            ]
            group = GROUPS[scheme](meaning.layer) if scheme in GROUPS else None
            partitions.append(Partition(weight.shape, tiles[0], group))
            unsure = scheme == "layer" and not meaning.sure_of_layer
            if unsure or len(set(tiles)) > 1:
                guesses.append((weight, partitions[-1]))
        if guesses:
            warnings.warn(explain(guesses), stacklevel=2)
        return tuple(partitions)

    def get_config(self) -> dict[str, Any]:
        """Plain JSON data from which `from_config` makes an equal object."""
        return {
            "scheme": to_json(self.scheme),
            "rules": {key: to_json(value) for key, value in self.rules.items()},
            "table": None
            if self.table is None
            else [
                {
                    "name": name,
                    "shape": list(partition.shape),
                    "block_shape": list(partition.block_shape),
                    "group": partition.group,
                }
                for name, partition in self.table
            ],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Blocking":
        table = config["table"]
        return cls(
            from_json(config["scheme"]),
            {key: from_json(value) for key, value in config["rules"].items()},
            None
            if table is None
            else tuple(
                (
                    row["name"],
                    Partition(
                        tuple(row["shape"]),
                        tuple(row["block_shape"]),
                        row["group"],
                    ),
                )
                for row in table
            ),
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


def match_rules(
    rules: Mapping[str, Any], weights: Sequence[Weight]
) -> list[str | None]:
    """The key of the rule for each variable: its path, else a pattern."""
    unused = set(rules)
    matches: list[str | None] = []
    for weight in weights:
        patterns = [key for key in rules if re.fullmatch(key, weight.path)]
        unused.difference_update(patterns, [weight.path])
        if weight.path in rules:
            patterns = [weight.path]
        if len(patterns) > 1:
            raise ValueError(
                f"Variable {weight.path!r} must match one of the `rules` at "
                f"most. Received: {patterns}. Make the patterns narrower, or "
                "give the path itself a rule."
            )
        matches.append(patterns[0] if patterns else None)
    if unused:
        paths = "\n  ".join(weight.path for weight in weights)
        raise ValueError(
            "Every key of `rules` must match the path of a variable. Received: "
            f"{sorted(unused)}, which match none of\n  {paths}"
        )
    return matches


def cut(weight: Weight, tile: Tile, rule: str | None) -> Partition:
    """Blocks of the shape that a user wrote."""
    source = "`scheme`" if rule is None else f"Blocking rule {rule!r}"
    where = f"{source} -> {tile} does not fit variable {weight.path!r}"
    if len(tile) != len(weight.shape):
        raise ValueError(
            f"{where}: the tuple has {len(tile)} entries, the shape "
            f"{weight.shape} has {len(weight.shape)}. Give one entry for each "
            "axis."
        )
    block_shape = tuple(
        max(size, 1) if n is None else n for size, n in zip(weight.shape, tile)
    )
    try:
        return Partition(weight.shape, block_shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def first_misfit(table: Table, weights: Sequence[Weight]) -> str | None:
    """Where the variables differ from those that a table was made for."""
    for i, ((name, partition), weight) in enumerate(zip(table, weights)):
        if (name, partition.shape) != (weight.name, weight.shape):
            return (
                f"variable {i} was {name!r} of shape {partition.shape} and is "
                f"{weight.path!r} of shape {weight.shape}"
            )
    if len(table) != len(weights):
        return f"there were {len(table)} variables and are {len(weights)}"
    return None


def explain(guesses: Sequence[tuple[Weight, Partition]]) -> str:
    shown = [
        f"\n  {weight.path!r} of shape {weight.shape}: blocks of "
        f"{partition.block_shape}"
        + (f", shared as {partition.group!r}" if partition.group else "")
        for weight, partition in guesses[:10]
    ]
    if len(guesses) > len(shown):
        shown.append(f"\n  and {len(guesses) - len(shown)} more")
    return (
        "Names and shapes allow more than one choice of blocks for "
        f"{len(guesses)} variables. Chosen:{''.join(shown)}\nTo say which is "
        "right, give these paths a tuple in `Blocking(rules=...)`."
    )


def to_json(scheme: str | Tile) -> str | list[int | None]:
    return scheme if isinstance(scheme, str) else list(scheme)


def from_json(scheme: str | list[int | None]) -> str | Tile:
    return scheme if isinstance(scheme, str) else tuple(scheme)
