"""Updates of variables that take one entry at a time: whole, or in parts."""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

Tensor = Any

# XLA makes one pass over memory for every variable that it writes on a CPU. If
# a large one is updated row by row, later passes find the row in the cache. One
# core makes such a loop, and others take over some of those that are left, up
# to four cores, and while there are more than eight.
# How many entries a row has at least and at most, and what is cut into rows;
# how many cores make loops, and how many loops there must be for each.
SHORTEST = 2**13
LONGEST = 2**15
LARGE = 2**18
MOST_CORES = 4
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

    @property
    def size(self) -> int:
        """How many entries the variables have."""
        return math.prod(self.shape)


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


def rows_of(update: EntryUpdate) -> int:
    """How many rows to cut variables into; 1 where that is of no use."""
    if not update.in_rows or update.size < LARGE:
        return 1
    along = math.prod(update.shape[: merging_axes(update)])
    few, many = -(-update.size // LONGEST), update.size // SHORTEST
    return next((n for n in range(few, many + 1) if along % n == 0), 1)


def smallest(updates: Sequence[EntryUpdate]) -> int:
    """The position of the smallest update."""
    return min(range(len(updates)), key=lambda i: updates[i].size)


def rows_of_each(updates: Sequence[EntryUpdate], cores: int) -> dict[int, int]:
    """How many rows each has, by position, of those that are to be cut.

    The smallest is not: it comes after the others.
    """
    cores = min(cores, MOST_CORES)
    # The loop of a larger one would go on when all others have ended.
    most = sum(update.size for update in updates) / cores
    last = smallest(updates)
    rows = {
        i: rows_of(update)
        for i, update in enumerate(updates)
        if i != last and update.size <= most
    }
    rows = {i: n for i, n in rows.items() if n > 1}
    return rows if len(rows) >= PER_CORE * cores else {}


def is_divided_unevenly(update: EntryUpdate, cores: int) -> bool:
    """Whether XLA would give the cores different parts of a vector.

    It then looks at every entry whether it is inside, and where there is a root
    to be taken, it makes one at a time: 1,048,573 entries take three times as
    long as 1,048,576.
    """
    n = update.size
    is_vector = n == max(update.shape, default=1)
    return update.in_parts and is_vector and n >= DIVIDED and n % cores > 0
