"""Keys that stand for variables: the path of one, or a regular expression."""

import re
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

from keras_blockwise.blocking.axes import Weight


def check_key(what: str, key: Any) -> None:
    """Raises an error if a key, or what it is, cannot match any variable."""
    if not isinstance(key, str):
        raise TypeError(
            f"{what} must be a string, the path of a variable or a regular "
            f"expression. Received: {key!r}."
        )
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(
            f"{what} must be the path of a variable or a regular expression "
            f"({error}). Received: {key!r}."
        ) from error


def match_keys(
    argument: str,
    keys: Iterable[str],
    weights: Sequence[Weight],
    other_paths: Sequence[str] = (),
) -> list[str | None]:
    """The key for each variable: its path, else a pattern, else `None`.

    Args:
        argument: What the keys are of, for the errors.
        keys: The keys.
        weights: The variables.
        other_paths: Paths of variables that a key may be for as well.

    Raises:
        ValueError: If two patterns match one variable, or a key matches none.
    """
    paths = {*other_paths, *(weight.path for weight in weights)}
    exact = paths.intersection(keys)
    patterns = {key: re.compile(key) for key in keys if key not in exact}
    unused = {
        key
        for key, pattern in patterns.items()
        if not any(pattern.fullmatch(path) for path in other_paths)
    }
    matches: list[str | None] = []
    for weight in weights:
        found = [
            key
            for key, pattern in patterns.items()
            if pattern.fullmatch(weight.path)
        ]
        unused.difference_update(found)
        if weight.path in exact:
            found = [weight.path]
        if len(found) > 1:
            raise ValueError(
                f"Variable {weight.path!r} must match one of the `{argument}` "
                f"at most. Received: {found}. Make the patterns narrower, or "
                "give the path itself a key."
            )
        matches.append(found[0] if found else None)
    if unused:
        lines = "\n  ".join(weight.path for weight in weights)
        raise ValueError(
            f"Every key of `{argument}` must match the path of a variable. "
            f"Received: {sorted(unused)}, which match none of\n  {lines}"
        )
    return matches
