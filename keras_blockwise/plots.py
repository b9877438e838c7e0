"""Pictures of step sizes: of all variables over time, and of their blocks."""

import math
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_blockwise.optimizer import BlockwiseOptimizer
from keras_blockwise.optimizer import last_step_sizes

Figure = Any

# Of the step sizes of a variable: what a history has of them.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Ratios of update to weights: below the first, float32 rounds the update off;
# the scale of colours is two powers of ten around the usual one.
DEAD, SLOW, FAST, FASTEST = 2.0**-24, 1e-5, 3e-2, 1e-1
# Characters of a name, and pixels of a picture along an axis.
LONGEST_NAME = 36
MOST_PIXELS = 1024
COLUMNS = 3
NO_NUMBER = "0.8"  # A grey.
# Cells with sharp edges, as wide as there is room.
IMAGE = {"aspect": "auto", "interpolation": "nearest"}


def plot_blocks(optimizer: BlockwiseOptimizer) -> Figure:
    """Draws the step size of each block, one picture per variable.

    The pictures have one scale of colours, so that they can be compared. The
    last axis of a variable is that from left to right, all others together are
    that from top to bottom, and a block is one rectangle. The step sizes are
    those of `BlockMonitor`. Grey is a block that does not move, since its
    learning rate is 0. Of more than 1,024 blocks along a side, evenly spaced
    ones are drawn.

    Args:
        optimizer: A built optimizer of this package that has taken a step.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        TypeError: If it is not an optimizer of this package.
        ValueError: If it is not built, has not taken a step, or is a `BCOS`,
            which keeps no second moments.
        ImportError: If `matplotlib` is not installed.

    Example:

    ```python
    model.compile(optimizer=kb.BlockAdam(3e-3), loss="mse")
    model.fit(x, y, verbose=0)
    kb.plot_blocks(model.optimizer).savefig("blocks.png")
    ```
    """
    own: Any = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(own, BlockwiseOptimizer):
        raise TypeError(
            "`optimizer` must be an optimizer of keras_blockwise. Received: "
            f"{optimizer!r}. Of a model, it is `model.optimizer`."
        )
    state = own.block_state  # Raises an error if it is not built.
    iterations = int(ops.convert_to_numpy(own.iterations))
    if iterations == 0:
        raise ValueError(
            "`optimizer` must have taken a step, which its step sizes are "
            f"known from. Received: {own!r}, iterations=0. Train first."
        )
    if not state.rule.second_moment.statistics:
        raise ValueError(
            "`optimizer` must keep second moments, which its step sizes are "
            f"made of. Received: {own!r}, which keeps none."
        )
    found = last_step_sizes(own)
    pictures = []
    for i in sorted(found):
        values = ops.convert_to_numpy(found[i].values)
        share = float(ops.mean(found[i].at_floor))
        title = f"{short(state.paths[i])}\n{blocks_of(values, share)}"
        pictures.append((title, picture_of(values)))
    return draw_blocks(pictures, type(own).__name__, iterations)


def blocks_of(values: np.ndarray, share: float) -> str:
    """How many blocks there are, and what share of them is at the floor."""
    if not values.ndim:
        return "one step size"
    text = f"{values.size:,} block{'s' * (values.size > 1)}"
    return f"{text}, {share:.0%} at floor" if share > 0 else text


def picture_of(values: np.ndarray) -> np.ndarray:
    """Numbers of blocks as rows and columns, no more than can be drawn."""
    columns = values.shape[-1] if values.ndim else 1
    picture = np.reshape(values, (-1, columns))
    rows, columns = (math.ceil(n / MOST_PIXELS) for n in picture.shape)
    return picture[::rows, ::columns]


def draw_blocks(
    pictures: Sequence[tuple[str, np.ndarray]], name: str, iterations: int
) -> Figure:
    """Draws pictures, each with its title, in one scale of colours."""
    mpl = matplotlib("plot_blocks")
    columns = min(COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = mpl.figure.Figure(
        figsize=(2.9 * columns + 1.0, 1.3 * rows + 0.9), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    pictures = [(title, positive(picture)) for title, picture in pictures]
    norm = log_scale(np.concatenate([p.ravel() for _, p in pictures]), mpl)
    for own in axes.ravel()[len(pictures) :]:
        own.set_axis_off()
    for own, (title, picture) in zip(axes.ravel(), pictures):
        own.set_title(title, fontsize=8)
        own.set(xticks=[], yticks=[], facecolor=NO_NUMBER)
        image = own.imshow(picture, norm=norm, **IMAGE)
    bar = figure.colorbar(image, ax=axes, label="step size")
    bar.ax.tick_params(which="minor", labelright=False)
    figure.suptitle(f"{name} after {iterations:,} steps", fontsize=11)
    return figure


def draw_history(
    history: Mapping[str, Sequence[Any]], matrices: Collection[str]
) -> Figure:
    """Draws what `BlockMonitor` has noted: variables over time.

    Args:
        history: That of the monitor.
        matrices: The names of the variables with two axes or more.
    """
    mpl = matplotlib("plot")
    start = "update_ratio/"
    names = [key[len(start) :] for key in history if key.startswith(start)]
    ratios, sizes, shares = (
        np.array([history[f"{kind}/{name}"] for name in names])
        for kind in ("update_ratio", "step_size", "floor_share")
    )
    sizes = positive(sizes[:, :, QUANTILES.index(0.5)])
    figure = mpl.figure.Figure(
        figsize=(10, 0.2 * len(names) + 2), layout="constrained"
    )
    axes = figure.subplots(1, 3, sharey=True)
    # What is below the scale is black, and here that is what does not move.
    visible = np.where(ratios < DEAD, DEAD, np.clip(ratios, SLOW, FASTEST))
    blue_to_red = mpl.colormaps["coolwarm"].with_extremes(under="black")
    scale, share = mpl.colors.LogNorm(SLOW, FASTEST), mpl.colors.Normalize(0, 1)
    for own, values, norm, label in (
        (axes[0], visible, scale, "update / weights (black: 0)"),
        (axes[1], sizes, log_scale(sizes, mpl), "median step size"),
        (axes[2], shares, share, "blocks at the floor"),
    ):
        colours = blue_to_red if norm is scale else "viridis"
        image = own.imshow(values, norm=norm, cmap=colours, **IMAGE)
        own.set_facecolor(NO_NUMBER)
        own.set_xlabel("step")
        bar = figure.colorbar(
            image, ax=own, location="top", label=label, aspect=30
        )
        bar.ax.tick_params(which="minor", labeltop=False)
    steps = history["step"]
    ticks = np.unique(np.linspace(0, len(steps) - 1, 5, dtype=int))
    for own in axes:
        own.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks])
    axes[0].set_yticks(range(len(names)), map(short, names), fontsize=9)
    marks = axes[2].secondary_yaxis("right")
    words = [mark(r, name in matrices) for name, r in zip(names, ratios)]
    marks.set_yticks(range(len(names)), words, fontsize=9)
    marks.tick_params(length=0)
    return figure


def mark(ratios: np.ndarray, matrix: bool) -> str:
    """What is worth a look in the ratios of update to weights over time."""
    if not np.isfinite(ratios[-1]):
        return "not finite"
    known = ratios[np.isfinite(ratios)]
    # Once a matrix is far too large, the ratio is small again; and a vector
    # moves fast in any case where it begins at 0.
    if matrix and known.max() > FAST:
        return "too fast"
    ratio = np.median(known)
    return "dead" if ratio < DEAD else "slow" if ratio < SLOW else ""


def log_scale(values: np.ndarray, mpl: Any) -> Any:
    """A scale of colours for the numbers above 0 that are finite."""
    known = values[np.isfinite(values)]
    least, most = (known.min(), known.max()) if known.size else (0.1, 1.0)
    # From one tick that has a number to another.
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    return mpl.colors.LogNorm(10.0**first, 10.0 ** max(last, first + 1))


def positive(values: np.ndarray) -> np.ndarray:
    """Those numbers that have a finite logarithm, and else NaN."""
    return np.where((values > 0) & np.isfinite(values), values, np.nan)


def short(name: str) -> str:
    """The end of a name, if it is long."""
    return name if len(name) <= LONGEST_NAME else f"…{name[-LONGEST_NAME:]}"


def matplotlib(name: str) -> Any:
    """The package, if it is there."""
    try:
        import matplotlib
        import matplotlib.colors
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            f"`{name}` needs matplotlib, which is not installed. Do `python "
            "-m pip install keras_blockwise[plot]`."
        ) from error
    return matplotlib
