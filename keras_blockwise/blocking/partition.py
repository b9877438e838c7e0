"""Blocks as data: a variable cut into equal rectangular tiles.

Shapes in, shapes out: nothing here knows layers, names or tensors.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Partition:
    """A variable of `shape` cut into tiles of `block_shape`.

    Args:
        shape: Shape of the variable.
        block_shape: Shape of one block; each entry divides the entry of
            `shape` on the same axis. `None`: no blocks, so that the variable
            takes plain steps of the learning rate.
        group: Name of an accumulator that several variables share, or `None`.
            A member of a group is one block: `block_shape == shape`.

    Raises:
        ValueError: If the ranks differ, a block size does not divide its axis,
            or a member of a group is cut or has no blocks.

    Example:

    >>> partition = Partition((6, 4), (3, 1))
    >>> partition.grid, partition.num_blocks, partition.block_size
    ((2, 4), 8, 3)
    """

    shape: Shape
    block_shape: Shape | None
    group: str | None = None

    def __post_init__(self) -> None:
        if len(self.tile) != len(self.shape):
            raise ValueError(
                f"`block_shape` must have one entry per axis of the shape "
                f"{self.shape}. Received: block_shape={self.block_shape}."
            )
        for axis, (size, tile) in enumerate(zip(self.shape, self.tile)):
            if tile < 1 or size % tile:
                raise ValueError(
                    f"axis {axis} has size {size}, which {tile} does not "
                    f"divide. Received: block_shape={self.block_shape} for a "
                    f"variable of shape {self.shape}."
                )
        whole = self.block_shape is not None and self.num_blocks <= 1
        if self.group is not None and not whole:
            raise ValueError(
                "A variable that shares the accumulator of a `group` must be "
                f"one block of shape {self.shape}. Received: "
                f"block_shape={self.block_shape}, group={self.group!r}."
            )

    @property
    def tile(self) -> Shape:
        """The shape of what has one step size: a block, or the variable."""
        if self.block_shape is None:
            return tuple(max(n, 1) for n in self.shape)
        return self.block_shape

    @property
    def grid(self) -> Shape:
        """Number of tiles along each axis."""
        return tuple(n // tile for n, tile in zip(self.shape, self.tile))

    @property
    def num_blocks(self) -> int:
        return 0 if self.block_shape is None else math.prod(self.grid)

    @property
    def block_size(self) -> int:
        """Number of coordinates in one tile, of this variable."""
        return math.prod(self.tile if self.group is None else self.shape)

    @property
    def accumulator_shape(self) -> Shape:
        """`grid`, or `()` where a group shares one number."""
        return self.grid if self.group is None else ()

    @property
    def blocks(self) -> np.ndarray:
        """The number of the tile that each coordinate is in."""
        numbers = np.arange(math.prod(self.grid)).reshape(self.grid)
        for axis, n in enumerate(self.tile):
            numbers = np.repeat(numbers, n, axis)
        return numbers

    @property
    def view_shape(self) -> Shape:
        """The smallest reshape in which every axis lies in or across blocks."""
        return tuple(extent for extent, _ in self._factors())

    @property
    def view_grid(self) -> Shape:
        """The grid, broadcastable to `view_shape`."""
        return tuple(1 if inside else n for n, inside in self._factors())

    @property
    def view_axes(self) -> Shape:
        """The axes of `view_shape` that lie inside a block."""
        return tuple(
            i for i, (_, inside) in enumerate(self._factors()) if inside
        )

    def _factors(self) -> list[tuple[int, bool]]:
        """Extents of the variable, each inside or across blocks, in order."""
        factors: list[tuple[int, bool]] = []
        for n, tile in zip(self.grid, self.tile):
            for extent, inside in ((n, False), (tile, True)):
                if extent == 1:
                    continue
                if factors and factors[-1][1] == inside:
                    extent *= factors.pop()[0]
                factors.append((extent, inside))
        return factors


@dataclass(frozen=True)
class Matrices:
    """A variable of `shape` seen as matrices of one shape.

    Args:
        shape: Shape of the variable.
        tile: The part of it that is one matrix, as a `block_shape`.
        rows: The axes that are the rows of a matrix, in order; the others are
            its columns.

    Raises:
        ValueError: If the tile does not fit the shape, or `rows` are not some
            of its axes.

    Example:

    >>> matrices = Matrices((8, 4, 16), (8, 1, 16), (0,))
    >>> matrices.matrix_shape
    (4, 8, 16)
    """

    shape: Shape
    tile: Shape
    rows: Shape

    def __post_init__(self) -> None:
        if list(self.rows) != [i for i in self._axes if i in self.rows]:
            raise ValueError(
                f"`rows` must be axes of the shape {self.shape}, in order. "
                f"Received: rows={self.rows}."
            )
        Partition(self.shape, self.tile)  # Raises an error.

    @property
    def partition(self) -> Partition:
        """The matrices as blocks."""
        return Partition(self.shape, self.tile)

    @property
    def _axes(self) -> range:
        return range(len(self.shape))

    @property
    def columns(self) -> Shape:
        """The other axes."""
        return tuple(axis for axis in self._axes if axis not in self.rows)

    @property
    def matrix_shape(self) -> Shape:
        """How many matrices there are, and their rows and columns."""
        rows = math.prod(self.tile[axis] for axis in self.rows)
        columns = math.prod(self.tile[axis] for axis in self.columns)
        return math.prod(self.shape) // (rows * columns), rows, columns

    @property
    def view_shape(self) -> Shape:
        """Two axes for each axis: across matrices, and within one."""
        sizes = ((n // size, size) for n, size in zip(self.shape, self.tile))
        return tuple(itertools.chain.from_iterable(sizes))

    @property
    def order(self) -> Shape:
        """The axes of `view_shape` in the order of `matrix_shape`."""
        within = (2 * axis + 1 for axis in (*self.rows, *self.columns))
        return (*(2 * axis for axis in self._axes), *within)
