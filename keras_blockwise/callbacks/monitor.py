"""What the blocks of every variable do, while a model trains."""

import math
import os
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blockwise.callbacks.events import EventFile
from keras_blockwise.callbacks.rates import optimizer_of
from keras_blockwise.callbacks.rates import value_of
from keras_blockwise.execution import compiled
from keras_blockwise.optimizer import BlockwiseOptimizer
from keras_blockwise.optimizer import last_step_sizes
from keras_blockwise.optimizer import rates_of
from keras_blockwise.optimizer import updated_variables
from keras_blockwise.plots import QUANTILES
from keras_blockwise.plots import draw_history
from keras_blockwise.validation import check_integer

Tensor = Any
Variable = Any

# Of more blocks than this, so many are looked at, drawn once with replacement.
MOST_BLOCKS = 2**16


class Before(NamedTuple):
    """What a step starts from: a copy of the weights, and the count."""

    weights: Sequence[Tensor]
    iterations: int


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
    (NaN). Of `BCOS`, which keeps no second moments, both are NaN. Of a matrix
    of `BlockMuon`, the step sizes have the learning rate as their mean, since
    it is the ratio of blocks that they set. The factors of the momentum are in
    none: neither the bias correction of Adam's, nor the warm-up of `SPAM`.

    Of a variable with more than 65,536 blocks, the quantiles are those of so
    many of them, drawn at random once. A batch whose step is not taken, as when
    gradients are accumulated, is followed until one is. With
    `steps_per_execution`, a change is that of all steps of an execution.

    It changes nothing of the training, and works on every backend and under
    `tf.distribute`, where it reads the first replica. On a batch that is looked
    at, there is a copy of the weights, and the time of a few passes over them;
    on all other batches nothing. `python -m benchmarks.monitor` measures it.

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
        self._before: Before | None = None

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
        self._measure: Callable[..., Any] | None = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._count += self._steps
        due = self._count % self.every < self._steps
        if not due or self._before is not None:
            return
        optimizer = optimizer_of(self.model)  # Under JAX, puts it in place.
        if optimizer.built:  # Unless this is the first step.
            weights = [ops.copy(value_of(v)) for v in weights_of(optimizer)]
            self._before = Before(weights, count_of(optimizer))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._before is None:
            return
        optimizer = optimizer_of(self.model)
        if count_of(optimizer) == self._before.iterations:
            return  # No step was taken.
        before, self._before = self._before, None
        if self._measure is None:
            self._measure = measurement(optimizer)
        values = [value_of(v) for v in involved(optimizer)]
        sizes, norms = map(
            ops.convert_to_numpy,
            self._measure(values, before.weights, *rates_of(optimizer)),
        )
        self._note(optimizer, sizes, norms)

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
            what a variable is whose median ratio is far from 1e-3: dead (below
            6e-8, which float32 rounds off), slow (below 1e-5), too fast (above
            1e-1); or that its last ratio is not finite.
        """
        if not self.history:
            raise ValueError(
                "`plot` must be called after a `fit` of `every` batches at the "
                f"least. Received: nothing yet, with every={self.every}."
            )
        return draw_history(self.history)

    def _note(
        self, optimizer: BlockwiseOptimizer, sizes: Any, norms: Any
    ) -> None:
        """Adds a look to the history, and to the file of events."""
        step = count_of(optimizer)
        self.history.setdefault("step", []).append(step)
        start = 0
        for name, row in zip(names_of(optimizer), norms):
            number, share, change, norm = map(float, row)
            own = sizes[start : start + int(number)]
            start += int(number)
            entries = {
                "step_size": quantiles(own),
                "update_ratio": ratio(change, norm),
                "floor_share": share,
            }
            for kind, entry in entries.items():
                self.history.setdefault(f"{kind}/{name}", []).append(entry)
            if self._events is not None:
                self._events.add(step, name, entries, own)


def names_of(optimizer: BlockwiseOptimizer) -> list[str]:
    """The paths of the variables that are updated; a second one is marked."""
    names: list[str] = []
    paths = optimizer.block_state.paths
    for i in updated_variables(optimizer):
        path, number = paths[i], paths[:i].count(paths[i])
        names.append(f"{path} ({number + 1})" if number else path)
    return names


def count_of(optimizer: BlockwiseOptimizer) -> int:
    """How many steps it has taken."""
    return int(ops.convert_to_numpy(optimizer.iterations))


def weights_of(optimizer: BlockwiseOptimizer) -> list[Variable]:
    variables = optimizer.block_state.variables
    return [variables[i] for i in updated_variables(optimizer)]


def involved(optimizer: BlockwiseOptimizer) -> list[Variable]:
    """All that a measurement reads."""
    return [*optimizer.variables, *weights_of(optimizer)]


def measurement(optimizer: BlockwiseOptimizer) -> Any:
    """Returns `measure(values, before, learning_rate, multipliers)`.

    `values` are those of the variables that are `involved`. What it returns are
    the step sizes of all variables in one vector, and a row for each variable:
    how many they are, the share at the floor, and the norms of the change and
    of the weights before.
    """
    variables = involved(optimizer)
    weights = weights_of(optimizer)
    dtype = optimizer.block_state.widest_dtype

    def norm(x: Tensor) -> Tensor:
        return ops.sqrt(ops.sum(ops.square(x)))

    def measure(
        values: Sequence[Tensor],
        before: Sequence[Tensor],
        learning_rate: Tensor,
        multipliers: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with keras.StatelessScope(list(zip(variables, values))):
            found = last_step_sizes(optimizer, learning_rate, multipliers)
        own = [found[i] for i in updated_variables(optimizer)]
        sizes = [ops.cast(sample(x.values), dtype) for x in own]
        rows = []
        after = values[len(values) - len(weights) :]
        for size, floor, old, new in zip(sizes, own, before, after):
            old, new = ops.cast(old, dtype), ops.cast(new, dtype)
            share = ops.cast(ops.mean(floor.at_floor), dtype)
            number = ops.full_like(share, size.shape[0])
            rows.append(ops.stack([number, share, norm(new - old), norm(old)]))
        return ops.concatenate(sizes), ops.stack(rows)

    return compiled(measure)


def sample(x: Tensor) -> Tensor:
    """As a vector, of at most so many numbers."""
    count = math.prod(x.shape)
    x = ops.reshape(x, (count,))
    if count <= MOST_BLOCKS:
        return x
    drawn = np.random.default_rng(0).integers(count, size=MOST_BLOCKS)
    return ops.take(x, np.sort(drawn))


def quantiles(sizes: np.ndarray) -> tuple[float, ...]:
    with np.errstate(invalid="ignore"):  # Between infinities.
        return tuple(map(float, np.quantile(sizes, QUANTILES)))


def ratio(change: float, norm: float) -> float:
    if norm:
        return change / norm
    return math.inf if change else 0.0
