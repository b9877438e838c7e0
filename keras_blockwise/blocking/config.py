"""Reads saved blocks: JSON that somebody may have edited or damaged."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any


def read(
    config: Any,
    owner: str,
    field: str,
    rule: str,
    is_valid: Callable[[Any], bool],
) -> Any:
    """A field of a config, if it is what it must be.

    Args:
        config: The config.
        owner: What the config is of, for the error.
        field: Name of the field.
        rule: What the field must be, for the error.
        is_valid: Whether the value is.

    Raises:
        ValueError: If it is not, or is missing.
    """
    if not isinstance(config, Mapping):
        raise ValueError(
            f"The config of {owner} must be a mapping. Received: {config!r}."
        )
    if field not in config:
        raise ValueError(
            f"The config of {owner} must have the field `{field}`. Received: "
            f"{sorted(map(str, config))}."
        )
    value = config[field]
    if not is_valid(value):
        raise ValueError(
            f"`{field}` in the config of {owner} must be {rule}. Received: "
            f"{value!r}."
        )
    return value


def is_string(value: Any) -> bool:
    return isinstance(value, str)


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def is_shape(value: Any) -> bool:
    return is_list(value) and all(type(n) is int and n >= 0 for n in value)
