"""What the blocks of every variable do, while a model trains."""

import math
import os
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blockwise.callbacks.events import EventFile
from keras_blockwise.callbacks.rates import optimizer_of
from keras_blockwise.execution import reading
from keras_blockwise.optimizer import BlockwiseOptimizer
from keras_blockwise.optimizer import last_step_sizes
from keras_blockwise.optimizer import updated_variables
from keras_blockwise.plots import QUANTILES
from keras_blockwise.plots import draw_history
from keras_blockwise.validation import check_integer

Tensor = Any

# Of more blocks than this, so many are looked at, drawn once with replacement.
MOST_BLOCKS = 2**16


class BlockMonitor(keras.callbacks.Callback):
    """Watches the step sizes of the blocks of every variable.

    Every so many batches, it notes for each variable:

    - `"step_size/<path>"`: five quantiles (5, 25, 50, 75 and 95 %) of the step
      sizes of its blocks: learning rate, multiplier and bias correction
      included, over the root of the second moment.
    - `"update_ratio/<path>"`: the norm of the last change of the variable, over
      that of the variable before it. About 1e-3 is usual.
    - `"floor_share/<path>"`: the share of its blocks at the floor of epsilon:
      where the root is no more than twice what it is where all gradients are 0.

    A variable without blocks has the learning rate for a step size and no floor
    (NaN). Of `BCOS`, which keeps no second moments, both are NaN. Of the
    matrices of `AdaBlock`, step sizes are those of the diagonals, one for each
    entry. Of a matrix of `BlockMuon`, they have the learning rate as their
    mean, since it is the ratio of blocks that they set. The factors of the
    momentum are in none: neither the bias correction of Adam's, nor the warm-up
    of `SPAM`.

    Of a variable with more than 65,536 blocks, the quantiles are those of so
    many of them, drawn at random once. A batch whose step is not taken, as when
    gradients are accumulated, is followed until one is. With
    `steps_per_execution`, a change is that of all steps of an execution.

    It changes nothing of the training, and works on every backend and under
    `tf.distribute`, where it reads the first replica. On a batch that is looked
    at, there is a copy of the weights, and the time of a few passes over them;
    on all other batches nothing. A look takes 1 to 20 ms for small models, and
    the first some seconds more for hundreds of layers. At the default, that is
    under 0.3 % where a step takes 100 ms, but 1 to 2 % where it takes 1 to
    6 ms: there, take a larger `every`. `python -m benchmarks.monitor` measures
    it.

    Args:
        log_dir: A folder for TensorBoard: all of this as scalars, and the
            decimal logarithms of the step sizes as histograms. Needs the
            package `tensorboard`. Each process that trains writes its own
            file: give it to one of them. Defaults to `None`: no files.
        every: Integer. How many batches from one look to the next.

    Attributes:
        history: A list for `"step"`, the count of steps of the optimizer, and
            for each of the names above, all equally long.

    Raises:
        ValueError: If `every` is out of its range; from `plot`, if there is
            nothing to draw.
        TypeError: If `log_dir` is no path. In `fit`, if the optimizer is not
            one of this package.
        ImportError: If `log_dir` needs `tensorboard`, or `plot` needs
            `matplotlib`, which is not installed.

    Example:

    ```python
    model.compile(optimizer=kb.BlockAdam(3e-3), loss="mse")
    monitor = kb.BlockMonitor(every=4)
    model.fit(x, y, epochs=4, verbose=0, callbacks=[monitor])
    monitor.plot().savefig("monitor.png")
    ```
    """

    def __init__(
        self, log_dir: str | os.PathLike[str] | None = None, every: int = 100
    ) -> None:
        super().__init__()
        self.log_dir = log_dir
        self.every = check_integer("every", every, 1)
        self.history: dict[str, list[Any]] = {}
        self._events = None if log_dir is None else EventFile(log_dir)
        self._count = 0
        self._matrices: set[str] = set()
        self._look: Look | None = None
        # The count of steps, and copies of the weights, before a step.
        self._before: tuple[Tensor, Sequence[Tensor]] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        optimizer = optimizer_of(model)
        if not isinstance(optimizer, BlockwiseOptimizer):
            raise TypeError(
                "`BlockMonitor` needs a model that is compiled with an "
                f"optimizer of keras_blockwise. Received: {optimizer!r}."
            )
        self._steps = model.steps_per_execution
        self._before = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._count += self._steps
        due = self._count % self.every < self._steps
        if not due or self._before is not None:
            return
        # Under JAX, `self.model` puts its state in place.
        optimizer = optimizer_of(self.model)
        if not optimizer.built:  # This is the first step.
            return
        if self._look is None or self._look.optimizer is not optimizer:
            self._look = Look(optimizer)
        self._before = self._look.before()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._before is None or self._look is None:
            return
        _ = self.model  # Under JAX, this puts its state in place.
        count, copies = self._before
        new_count, *found = map(ops.convert_to_numpy, self._look.after(copies))
        if new_count == ops.convert_to_numpy(count):
            return  # No step was taken.
        self._before = None
        self._note(self._look, int(new_count), found)

    def on_train_end(self, logs: Any = None) -> None:
        self._before = None
        if self._events is not None:
            self._events.flush()

    def plot(self) -> Any:
        """Draws all variables over time.

        Returns:
            A `matplotlib.figure.Figure`, with a row for each variable and a
            column for each look: the ratio of the update to the weights, in
            blue where it is small, in red where it is large, and in black
            where nothing moves; the median step size; and the share of blocks
            at the floor. Grey is no number above 0. A word after the row says
            what is worth a look: dead (the median ratio is below 6e-8, which
            float32 rounds off), slow (below 1e-5), too fast (above 3e-2 at any
            time; not of vectors, such as biases, which are fast where they
            begin at 0), or not finite (the last ratio).
        """
        if not self.history:
            raise ValueError(
                "`plot` must be called after a `fit` of `every` batches at the "
                f"least. Received: nothing yet, with every={self.every}."
            )
        return draw_history(self.history, self._matrices)

    def _note(self, look: "Look", step: int, found: Any) -> None:
        """Adds a look to the history, and to the file of events."""
        self.history.setdefault("step", []).append(step)
        self._matrices |= look.matrices
        sizes, at_floor, *squares = found
        starts = np.cumsum([0, *look.numbers])
        shares = np.add.reduceat(at_floor, starts[:-1]) / look.numbers
        norms = np.sqrt(squares).tolist()
        for name, start, end, share, change, norm in zip(
            look.names, starts, starts[1:], shares.tolist(), *norms
        ):
            size = sizes[start:end]
            entries = {
                "step_size": quantiles(size),
                "update_ratio": ratio(change, norm),
                "floor_share": share,
            }
            for kind, entry in entries.items():
                self.history.setdefault(f"{kind}/{name}", []).append(entry)
            if self._events is not None:
                self._events.add(step, name, entries, size)


class Look:
    """What is read before and after a step, by compiled functions.

    `before()` returns how many steps have been taken, and copies of the
    weights. `after(copies)` returns the count again; the step sizes of all
    variables, in one vector, and whether each is at the floor; and for each
    variable the squared norms of the change and of the weights before.

    Args:
        optimizer: A built optimizer.
    """

    def __init__(self, optimizer: BlockwiseOptimizer) -> None:
        self.optimizer = optimizer
        self.updated = updated_variables(optimizer)
        self.names = names_of(optimizer)
        weights = [optimizer.block_state.variables[i] for i in self.updated]
        self.matrices = {
            name for name, v in zip(self.names, weights) if len(v.shape) > 1
        }
        # How many step sizes are looked at, of each variable.
        self.numbers: list[int] = []
        self.dtype = optimizer.block_state.widest_dtype
        # All that is read; a compiler leaves out what is not used.
        self.variables = [*weights, *optimizer.variables]
        self.before: Callable[[], Any] = reading(self._before, self.variables)
        self.after: Callable[..., Any] = reading(self._after, self.variables)

    def _before(self, values: Sequence[Tensor]) -> Any:
        copies = [ops.copy(value) for value in values[: len(self.updated)]]
        return self._count(values), copies

    def _count(self, values: Sequence[Tensor]) -> Tensor:
        with keras.StatelessScope(list(zip(self.variables, values))):
            return ops.copy(ops.convert_to_tensor(self.optimizer.iterations))

    def _after(self, values: Sequence[Tensor], before: Sequence[Tensor]) -> Any:
        with keras.StatelessScope(list(zip(self.variables, values))):
            found = last_step_sizes(self.optimizer)
        own = [found[i] for i in self.updated]
        sizes = [sample(x.values) for x in own]
        self.numbers = [size.shape[0] for size in sizes]
        changes, norms = [], []
        for old, new in zip(before, values):
            old, new = ops.cast(old, self.dtype), ops.cast(new, self.dtype)
            changes.append(ops.sum(ops.square(new - old)))
            norms.append(ops.sum(ops.square(old)))
        return (
            self._count(values),
            ops.concatenate(sizes),
            ops.concatenate([sample(x.at_floor) for x in own]),
            ops.stack(changes),
            ops.stack(norms),
        )


def names_of(optimizer: BlockwiseOptimizer) -> list[str]:
    """The paths of the variables that are updated; a second one is marked."""
    names: list[str] = []
    paths = optimizer.block_state.paths
    for i in updated_variables(optimizer):
        path, number = paths[i], paths[:i].count(paths[i])
        names.append(f"{path} ({number + 1})" if number else path)
    return names


def sample(x: Tensor) -> Tensor:
    """As a vector, of at most so many numbers."""
    count = math.prod(x.shape)
    x = ops.reshape(x, (count,))
    if count <= MOST_BLOCKS:
        return x
    drawn = np.random.default_rng(0).integers(count, size=MOST_BLOCKS)
    return ops.take(x, np.sort(drawn))


def quantiles(sizes: np.ndarray) -> tuple[float, ...]:
    """As `np.quantile`, which takes ten times as long for a few numbers."""
    count = sizes.size
    ranks = np.multiply(QUANTILES, count - 1)
    return tuple(np.interp(ranks, np.arange(count), np.sort(sizes)).tolist())


def ratio(change: float, norm: float) -> float:
    if norm:
        return change / norm
    return math.inf if change else 0.0
