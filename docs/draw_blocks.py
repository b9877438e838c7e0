"""Draws what a block is in four weights, from real layers and partitions.

    python docs/draw_blocks.py

A picture has one panel for each scheme. Every square is an entry of the weight;
a line surrounds each block, and dots part what an axis of the weight parts.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

import keras_blockwise as kb

IMAGES = Path(__file__).parent / "images"

CELL = 20  # An entry.
LEFT, TOP, BOTTOM = 28, 60, 28
WIDTH = 240
COLOURS = 5  # More than a weight has axes.
STYLE = """
  text { font: 15px sans-serif; fill: #1f2328; }
  .name { font: bold 15px monospace; }
  .axis { font-size: 13px; fill: #59636e; }
  rect { stroke: #1f2328; stroke-opacity: 0.2; }
  path { stroke: #1f2328; stroke-width: 2; fill: none; }
  .part { stroke-width: 1.5; stroke-dasharray: 2 3; }
  .c0 { fill: #8ab6f0; } .c1 { fill: #f6c177; } .c2 { fill: #9ad0a0; }
  .c3 { fill: #e8a2b4; } .c4 { fill: #c3aee8; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .axis { fill: #a9b3bf; }
    path { stroke: #e6edf3; }
    .c0 { fill: #3f74b8; } .c1 { fill: #b07a2e; } .c2 { fill: #4c8a55; }
    .c3 { fill: #a8536b; } .c4 { fill: #7a60ab; }
  }
"""


class Picture(NamedTuple):
    """A weight and how to lay it out.

    Args:
        title: What it shows, for who cannot see it.
        weight: Path of the weight in `make_model`.
        rows: The axes from top to bottom, the innermost last.
        columns: The axes from left to right, the innermost last.
        down: What is written beside the rows.
        across: What is written above the columns.
        schemes: The panels.
    """

    title: str
    weight: str
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    down: str
    across: str
    schemes: tuple[str, ...]


PICTURES = {
    "dense": Picture(
        "Blocks of a Dense kernel of 6 inputs and 8 units",
        "dense/kernel",
        (0,),
        (1,),
        "6 inputs",
        "8 units",
        ("coordinate", "output_unit", "input_unit", "variable"),
    ),
    "convolution": Picture(
        "Blocks of a convolution of 2 input and 3 output channels",
        "convolution/kernel",
        (2, 0),
        (3, 1),
        "2 input channels",
        "3 output channels",
        ("coordinate", "output_unit", "filter", "variable"),
    ),
    "attention": Picture(
        "Blocks of a query projection with 2 heads of 4 units",
        "attention/query/kernel",
        (0,),
        (1, 2),
        "6 inputs",
        "2 heads of 4 units",
        ("coordinate", "output_unit", "head", "variable"),
    ),
    "embedding": Picture(
        "Blocks of an embedding of 6 tokens in 8 dimensions",
        "embedding/embeddings",
        (0,),
        (1,),
        "6 tokens",
        "8 dimensions",
        ("coordinate", "output_unit", "input_unit", "variable"),
    ),
}


def make_model() -> keras.Model:
    """A model that has the four weights."""
    tokens = keras.Input((5,), dtype="int32")
    image = keras.Input((5, 5, 2))
    x = layers.Embedding(6, 8, name="embedding")(tokens)
    x = layers.Dense(6, name="between")(x)
    attended = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    outputs = [
        layers.Dense(8, name="dense")(attended),
        layers.Conv2D(3, 3, name="convolution")(image),
    ]
    return keras.Model([tokens, image], outputs)


def laid_out(values: np.ndarray, picture: Picture) -> np.ndarray:
    """The entries of the weight as rows and columns of squares."""
    values = values.transpose(*picture.rows, *picture.columns)
    rows = math.prod(values.shape[: len(picture.rows)])
    return values.reshape(rows, -1)


def borders(values: np.ndarray) -> str:
    """The lines between squares with other values, and around all."""
    lines = []
    padded = np.pad(values, 1, constant_values=-1)
    for row, column in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        x, y = LEFT + column * CELL, TOP + row * CELL
        lines.append(f"M{x} {y}h{CELL}")
    for row, column in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        x, y = LEFT + column * CELL, TOP + row * CELL
        lines.append(f"M{x} {y}v{CELL}")
    return "".join(lines)


def panel(partition: kb.Partition, scheme: str, picture: Picture) -> list[str]:
    grid = np.unravel_index(partition.blocks, partition.grid)
    # Neighbours along any axis have other colours.
    colours = sum((axis + 1) * number for axis, number in enumerate(grid))
    tile = " × ".join(map(str, partition.block_shape))
    lines = [
        f'<text class="name" x="{LEFT}" y="16">"{scheme}"</text>',
        f'<text x="{LEFT}" y="35">{partition.num_blocks} '
        f"block{'s' * (partition.num_blocks > 1)} of {tile}</text>",
        f'<text class="axis" x="{LEFT}" y="{TOP - 7}">'
        f"{picture.across} →</text>",
        f'<text class="axis" transform="translate({LEFT - 17} {TOP}) '
        f'rotate(90)">{picture.down} →</text>',
    ]
    for (row, column), colour in np.ndenumerate(laid_out(colours, picture)):
        lines.append(
            f'<rect class="c{colour % COLOURS}" x="{LEFT + column * CELL}" '
            f'y="{TOP + row * CELL}" width="{CELL}" height="{CELL}"/>'
        )
    outer = (*picture.rows[:-1], *picture.columns[:-1])
    parts = kb.Partition(
        partition.shape,
        tuple(
            1 if axis in outer else size
            for axis, size in enumerate(partition.shape)
        ),
    )
    for class_, of in ("part", parts), ("block", partition):
        line = borders(laid_out(of.blocks, picture))
        lines.append(f'<path class="{class_}" d="{line}"/>')
    return lines


def draw(picture: Picture, model: keras.Model) -> str:
    """The picture as SVG."""
    (index,) = [
        i
        for i, variable in enumerate(model.trainable_variables)
        if variable.path == picture.weight
    ]
    lines = []
    for number, scheme in enumerate(picture.schemes):
        blocking = kb.Blocking.from_model(model, scheme)
        rows = blocking.resolve(model.trainable_variables)
        partition = rows[index].partition
        rows_of_squares = len(laid_out(partition.blocks, picture))
        height = TOP + rows_of_squares * CELL + BOTTOM
        row, column = divmod(number, 2)
        move = f"translate({column * WIDTH} {row * height})"
        lines += [f'<g transform="{move}">']
        lines += [*panel(partition, scheme, picture), "</g>"]
    size = 2 * WIDTH, height * ((len(picture.schemes) + 1) // 2)
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" role="img" '
            f'width="{size[0]}" height="{size[1]}" '
            f'viewBox="0 0 {size[0]} {size[1]}">',
            f"<title>{picture.title}</title>",
            f"<style>{STYLE}</style>",
            *lines,
            "</svg>\n",
        ]
    )


def draw_all() -> dict[str, str]:
    """Every picture by the name of its file."""
    model = make_model()
    return {
        f"{name}.svg": draw(picture, model)
        for name, picture in PICTURES.items()
    }


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, drawing in draw_all().items():
        (IMAGES / name).write_text(drawing, "utf-8")
