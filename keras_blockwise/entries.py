"""Updates of variables that take one entry at a time: whole, or in parts."""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

Tensor = Any

# XLA makes one pass over memory for every variable that it writes on a CPU. If
# all variables are updated row by row, later passes find a row in the cache.
# How many entries a row of them all has, and one of one variable may have; how
# many rows there are at most, since each takes the start of a loop for every
# variable; and how many variables keep a core busy.
ROW_ENTRIES = 2**18
SHORTEST = 2**9
LONGEST = 2**18
MOST_ROWS = 64
PER_CORE = 8
# How many entries XLA divides among cores at least; its limit is near 26,000.
DIVIDED = 25_000


class EntryUpdate(NamedTuple):
    """An update of variables that takes one entry at a time.

    Args:
        function: Takes entries of `inputs` and of `values`, and returns the new
            entries of each variable. They do not depend on variables that stand
            before it.
        shape: That of the variables, or what they are reshaped to.
        inputs: Tensors of this shape, or with ones in it.
        values: Tensors of this shape, what the variables are now.
        in_parts: Whether the function takes some of the entries as well as all
            of them, and returns the dtypes of the variables.
        in_rows: Whether, besides, more than the first variable needs all of the
            inputs, so that cutting them into rows spares memory traffic.
    """

    function: Callable[..., Sequence[Tensor]]
    shape: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    in_parts: bool
    in_rows: bool


def merging_axes(update: EntryUpdate) -> int:
    """How many of the first axes can be one for every tensor.

    Along all of them an input has one entry, or as many as the variables.
    """
    spans = None
    for axis, n in enumerate(update.shape):
        here = [x.shape[axis] == n for x in update.inputs]
        if n > 1 and here != (spans := spans or here):
            return axis
    return len(update.shape)


def rows_of(
    updates: Sequence[EntryUpdate], cores: int
) -> tuple[int, list[int]]:
    """How many rows to cut variables into, and which updates to cut."""
    sizes = {
        i: math.prod(update.shape)
        for i, update in enumerate(updates)
        if update.in_rows
    }
    rows = 1
    while rows < MOST_ROWS and rows * ROW_ENTRIES < sum(sizes.values()):
        rows *= 2
    to_cut = [
        i
        for i, size in sizes.items()
        if SHORTEST <= size / rows <= LONGEST
        and math.prod(updates[i].shape[: merging_axes(updates[i])]) % rows == 0
    ]
    worthwhile = rows > 1 and len(to_cut) >= PER_CORE * cores
    return rows, to_cut if worthwhile else []


def is_divided_unevenly(update: EntryUpdate, cores: int) -> bool:
    """Whether XLA would give the cores different parts of a vector.

    It then looks at every entry whether it is inside, and where there is a root
    to be taken, it makes one at a time: 1,048,573 entries take three times as
    long as 1,048,576.
    """
    n = math.prod(update.shape)
    is_vector = n == max(update.shape, default=1)
    return update.in_parts and is_vector and n >= DIVIDED and n % cores > 0
