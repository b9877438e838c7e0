"""Partitions that Hypothesis makes, and their blocks by brute force."""

import math

import keras
import numpy as np
from hypothesis import Phase
from hypothesis import settings
from hypothesis import strategies as st

from keras_blockwise.blocking.partition import Partition

examples = settings(
    deadline=None,
    derandomize=True,
    # JAX compiles every operation for every shape.
    max_examples=8 if keras.backend.backend() == "jax" else 25,
    phases=[Phase.explicit, Phase.generate],
)
few_examples = settings(examples, max_examples=5)


@st.composite
def partitions(draw, max_rank=4):
    """A grid of tiles; many extents are 1."""
    rank = draw(st.integers(0, max_rank))
    extents = st.lists(
        st.sampled_from([1, 1, 2, 3]), min_size=rank, max_size=rank
    )
    grid, tile = draw(extents), draw(extents)
    shape = tuple(n * size for n, size in zip(grid, tile))
    return Partition(shape, tuple(tile))


def corners(partition):
    """The slices of each block, in the order of the grid."""
    for index in np.ndindex(*partition.grid):
        yield (
            index,
            tuple(
                slice(i * size, (i + 1) * size)
                for i, size in zip(index, partition.block_shape)
            ),
        )


def integers(shape):
    """Numbers whose sums are exact, no two alike."""
    return np.arange(1.0, 1 + math.prod(shape)).reshape(shape)
