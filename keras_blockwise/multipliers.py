"""Factors of the learning rate: of single variables, and layer by layer."""

import math
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import keras

from keras_blockwise.blocking.axes import Weight
from keras_blockwise.blocking.matching import check_key
from keras_blockwise.blocking.matching import match_keys
from keras_blockwise.validation import is_number

ARGUMENT = "learning_rate_multipliers"


@dataclass(frozen=True)
class Multipliers:
    """Factors by the paths of variables, or by patterns that match these.

    Args:
        factors: The factor of each key.
        keys: The key of each variable, `None` for one without; `None` if the
            variables are not known yet.
    """

    factors: dict[str, float]
    keys: tuple[str | None, ...] | None = None

    @classmethod
    def of(cls, argument: Any) -> "Multipliers | None":
        """What a user has given, checked."""
        if argument is None or isinstance(argument, cls):
            return argument
        if not isinstance(argument, Mapping):
            raise TypeError(
                f"`{ARGUMENT}` must map paths of variables to factors. "
                f"Received: {ARGUMENT}={argument!r}."
            )
        for key, factor in argument.items():
            check_key(f"A key of `{ARGUMENT}`", key)
            if not is_number(factor) or not 0 <= factor < math.inf:
                raise ValueError(
                    f"`{ARGUMENT}[{key!r}]` must be a number in [0, inf). "
                    f"Received: {factor!r}."
                )
        return cls({key: float(f) for key, f in argument.items()})

    def matched(
        self, variables: Sequence[Any], as_saved: bool = False
    ) -> "Multipliers":
        """The same, with the key of each variable.

        Args:
            variables: The variables.
            as_saved: Whether to keep those of a config, if there are any.
        """
        if as_saved and self.keys and len(self.keys) == len(variables):
            return self
        weights = list(map(Weight.of, variables))
        keys = match_keys(ARGUMENT, self.factors, weights)
        return replace(self, keys=tuple(keys))

    def values(self) -> list[float]:
        """The factor of each variable."""
        return [
            1.0 if key is None else self.factors[key] for key in self.keys or ()
        ]

    def with_keys_of(
        self, other: "Multipliers | None", variables: Sequence[Any]
    ) -> "Multipliers":
        """The same, with the key of each variable: that of others, if equal."""
        if other is not None and other.factors.keys() == self.factors.keys():
            return replace(self, keys=other.keys)
        return self.matched(variables)

    def with_values(self, values: Sequence[float]) -> dict[str, float]:
        """The factors, if those of the variables are now these."""
        now = dict(self.factors)
        old = self.values()
        for key, before, value in zip(self.keys or (), old, values):
            if key is not None and value != type(value)(before):
                now[key] = float(value)
        return now

    def get_config(self) -> Any:
        """Plain data: the factors, and the key of each variable once known.

        Paths change when a model is loaded; the order of variables does not.
        """
        if self.keys is None:
            return self.factors
        return [self.factors, list(self.keys)]

    @classmethod
    def from_config(cls, config: Any) -> "Multipliers | None":
        """The inverse of `get_config`."""
        if not isinstance(config, list | tuple):
            return cls.of(config)
        if len(config) == 2 and isinstance(config[0], Mapping):
            given, keys = cls.of(config[0]), config[1]
            if isinstance(keys, list | tuple) and all(
                key is None or (isinstance(key, str) and key in config[0])
                for key in keys
            ):
                return given and replace(given, keys=tuple(keys))
        raise ValueError(
            f"`{ARGUMENT}` in a config must be a mapping, or a list of one and "
            f"of the key of each variable. Received: {ARGUMENT}={config!r}."
        )


def layerwise_decay(model: keras.Model, decay: float) -> dict[str, float]:
    """Learning rates that fall from the output of a model to its input.

    The variables of the last layer have a factor of 1, those of the one before
    it `decay`, then `decay^2`, and so on. Layers without trainable variables do
    not count, and a model within the model counts layer by layer. Any other
    layer is one, whatever it is made of; so freeze and nest as you fine-tune.

    Args:
        model: A built model.
        decay: Factor from each layer to the one before it, in [0, 1].

    Returns:
        The factor of each trainable variable by its path: a
        `learning_rate_multipliers` of any optimizer of this package.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If it is not built, if `decay` is out of its range, or if
            variables of two layers have the same path.

    Example:

    ```python
    multipliers = kb.layerwise_decay(model, 0.9)
    optimizer = kb.BlockAdam(1e-4, learning_rate_multipliers=multipliers)
    model.compile(optimizer=optimizer, loss="mse")
    ```

    Reference:

    - [Clark et al., 2020](https://arxiv.org/abs/2003.10555), whose fine-tuning
      has such rates
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r}."
        )
    if not model.built:
        raise ValueError(
            "`model` must be built. Call it once, or "
            f"`model.build(input_shape)`. Received: model={model!r}."
        )
    if not is_number(decay) or not 0 <= decay <= 1:
        raise ValueError(
            f"`decay` must be a number in [0, 1]. Received: decay={decay!r}."
        )
    factors: dict[str, float] = {}
    owners: dict[str, int] = {}
    trained = {id(v) for v in model.trainable_variables}
    # A frozen layer tells of no trainable one within it, as LoRA leaves it.
    by_layer = [
        own
        for layer in layers_of(model)
        if (own := [v for v in layer.variables if id(v) in trained])
    ]
    for depth, variables in enumerate(reversed(by_layer)):
        for variable in variables:
            if owners.setdefault(variable.path, id(variable)) != id(variable):
                raise ValueError(
                    "The variables of `model` must have paths of their own. "
                    f"Received: {variable.path!r} twice. Name its layers."
                )
            factors.setdefault(variable.path, float(decay) ** depth)
    return factors


def layers_of(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers of a model in order, those of models within it in place."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from layers_of(layer)
        else:
            yield layer
