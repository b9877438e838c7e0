"""Learning rates from the curvature of the loss, while a model trains."""

import itertools
import math
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blockwise.execution import compiled
from keras_blockwise.execution import number_of_replicas
from keras_blockwise.optimizer import groups_of
from keras_blockwise.validation import check_fraction
from keras_blockwise.validation import check_integer
from keras_blockwise.validation import is_number

Tensor = Any
Variable = Any
# Of a parabola through the losses.
LEAST_R_SQUARED = 0.99
# How far one fit can move a rate.
RANGE = (0.5, 2.0)


class HessianInformedRates(keras.callbacks.Callback):
    """Sets the learning rate of each group of variables by the loss itself.

    A group is what a key of `learning_rate_multipliers` matches. Every few
    steps, the weights of one group after the other are moved along the step
    that has just been taken, by several multiples `x` of it, and the loss of a
    new batch is computed there. A parabola `A x^2 / 2 - b x` that fits its
    changes is lowest at `x = b / A`. The multiplier `c` of the group becomes
    `smoothing * c + (1 - smoothing) * c * x`, with `x` between 1/2 and 2.

    A group keeps its rate if its parabola has no lowest point ahead (`A <= 0`
    or `b <= 0`), if it does not fit (`R^2 < 0.99`), or if a loss is not finite.
    So does one that has not moved, such as a frozen one. The losses are those
    of `model.compute_loss`, with the model as in `evaluate`. Nothing but the
    multipliers changes; they are saved with the optimizer.

    The learning rates and the influences `b^2 / A`, twice what the best step of
    a group would take off the loss, are in the history of `fit` as
    `"rate/<key>"` and `"influence/<key>"`: at the end of each epoch, the
    influence that of the last good fit, NaN before there is one.

    Args:
        data: Batches `(x, y)` or `(x, y, sample_weight)` as `fit` takes them: a
            `tf.data.Dataset`, a `keras.utils.PyDataset` or any iterable. Each
            time, one batch is taken; after the last, it starts again.
        every: Integer. How many batches to train between two measurements.
        factors: At least two different numbers except 0: the multiples of the
            step. Each costs one forward pass for each group.
        smoothing: How much of the old multiplier stays, in [0, 1).

    Attributes:
        history: A list for `"batch"`, the number of each batch after which the
            callback has measured, and for each `"rate/<key>"` and
            `"influence/<key>"`, NaN where the fit was bad.

    Raises:
        TypeError: If `data` is not made of batches.
        ValueError: If another argument is out of its range. In `fit`: if the
            optimizer has no `learning_rate_multipliers`, if
            `steps_per_execution` is not 1, under several replicas, or if `data`
            has no batch left.

    Example:

    ```python
    groups = {".*hidden/.*": 1.0, ".*out/.*": 1.0}
    optimizer = kb.BlockAdam(1e-3, learning_rate_multipliers=groups)
    model.compile(optimizer=optimizer, loss="mse")
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 256, 32)]
    rates = kb.HessianInformedRates(batches, every=4)
    history = model.fit(x, y, callbacks=[rates]).history
    ```

    Reference:

    - [Hi-DLR, arXiv:2501.06954](https://arxiv.org/abs/2501.06954), with a
      diagonal `A`, and along the last step instead of the next
    - [GeN, arXiv:2407.02772](https://arxiv.org/abs/2407.02772), whose authors'
      code has this fit, these bounds and this smoothing
    """

    def __init__(
        self,
        data: Iterable[Any],
        every: int = 8,
        factors: Sequence[float] = (-2, -1, 1, 2),
        smoothing: float = 0.9,
    ) -> None:
        super().__init__()
        self.data = check_data(data)
        self.every = check_integer("every", every, 1)
        self.factors = check_factors(factors)
        self.smoothing = check_fraction("smoothing", smoothing)
        self.history: dict[str, list[float]] = {}
        self._batches: Iterator[Any] = iter(())
        self._count = 0
        # Of the variables in a group, before a step that is measured.
        self._before: dict[str, list[Tensor]] = {}
        self._influence: dict[str, float] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        check_model(self.model)
        self._loss = loss_function(self.model)
        self._before = {}

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._count += 1
        if self._count % self.every:
            return
        optimizer = optimizer_of(self.model)
        if optimizer.built:  # Unless this is the first step.
            self._before = {
                key: [ops.copy(value_of(v)) for v in variables]
                for key, variables in groups_of(optimizer).items()
            }

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self._before:
            return
        model = self.model  # Under JAX, this puts its state in place.
        optimizer = optimizer_of(model)
        before, self._before = self._before, {}
        losses = self._losses(model, groups_of(optimizer), before)
        multipliers = optimizer.learning_rate_multipliers
        influence = dict.fromkeys(multipliers, math.nan)
        for key, changes in losses.items():
            parabola = fitted_parabola(self.factors, changes)
            if parabola is not None:
                a, b = parabola
                x = min(max(b / a, RANGE[0]), RANGE[1])
                kept = self.smoothing + (1 - self.smoothing) * x
                multipliers[key] *= kept
                influence[key] = b * b / a
                self._influence[key] = influence[key]
        optimizer.learning_rate_multipliers = multipliers
        entry = {"batch": self._count, **report(optimizer, influence)}
        for name, value in entry.items():
            self.history.setdefault(name, []).append(value)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs.update(report(optimizer_of(self.model), self._influence))

    def _losses(
        self,
        model: keras.Model,
        groups: Mapping[str, Sequence[Variable]],
        before: Mapping[str, Sequence[Tensor]],
    ) -> dict[str, np.ndarray]:
        """How the loss changes along the step of each group, at the factors."""
        batch = self._next_batch()
        positions = {id(v): i for i, v in enumerate(model.variables)}
        here = [value_of(v) for v in model.variables]
        losses = [self._loss(here, *batch)]
        for key, variables in groups.items():
            places = [positions[id(v)] for v in variables]
            for factor in self.factors:
                there = list(here)
                for place, old in zip(places, before[key]):
                    there[place] = here[place] + factor * (here[place] - old)
                losses.append(self._loss(there, *batch))
        numbers = np.array([float(ops.convert_to_numpy(x)) for x in losses])
        with np.errstate(invalid="ignore"):  # The difference of infinities.
            changes = (numbers[1:] - numbers[0]).reshape(len(groups), -1)
        return dict(zip(groups, changes))

    def _next_batch(self) -> tuple[Any, Any, Any]:
        """Inputs, targets and weights of samples, as tensors."""
        batch = next(self._batches, None)
        if batch is None:
            self._batches = batches_of(self.data)
            batch = next(self._batches, None)
        if batch is None:
            raise ValueError(
                "`data` must have batches, and again when all were taken: not "
                "a generator that ends, but a list of what it yields, say. "
                f"Received: data={self.data!r}, which has none left."
            )
        tensors: tuple[Any, Any, Any] = keras.tree.map_structure(
            lambda x: x if x is None else ops.convert_to_tensor(x),
            keras.utils.unpack_x_y_sample_weight(batch),
        )
        return tensors


def check_data(data: Any) -> Any:
    arrays = isinstance(data, tuple | Mapping | str) or hasattr(data, "shape")
    if isinstance(data, keras.utils.PyDataset) or (
        isinstance(data, Iterable) and not arrays
    ):
        return data
    raise TypeError(
        "`data` must be batches `(x, y)` or `(x, y, sample_weight)`: a "
        "`tf.data.Dataset`, a `keras.utils.PyDataset`, or an iterable such as "
        f"a list. Received: data of type {type(data).__name__}. One batch is "
        "`[(x, y)]`."
    )


def check_factors(factors: Any) -> tuple[float, ...]:
    if (
        isinstance(factors, list | tuple)
        and all(is_number(x) and x and math.isfinite(x) for x in factors)
        and len(set(factors)) > 1
    ):
        return tuple(float(x) for x in factors)
    raise ValueError(
        "`factors` must be at least two different finite numbers except 0. "
        f"Received: factors={factors!r}."
    )


def check_model(model: keras.Model) -> None:
    """Raises an error if steps of this model cannot be measured."""
    multipliers = getattr(
        optimizer_of(model), "learning_rate_multipliers", None
    )
    if not multipliers:
        raise ValueError(
            "`HessianInformedRates` needs an optimizer of this package whose "
            "`learning_rate_multipliers` has a key for each group, such as "
            '`{".*": 1.0}`. Received: '
            f"optimizer={optimizer_of(model)!r} with {multipliers!r}."
        )
    if model.steps_per_execution != 1:
        raise ValueError(
            "`steps_per_execution` must be 1 with `HessianInformedRates`, "
            "which looks at single steps. Received: "
            f"steps_per_execution={model.steps_per_execution}. Compile the "
            "model without."
        )
    replicas = number_of_replicas(model)
    if replicas != 1:
        raise ValueError(
            "`HessianInformedRates` must have one replica: others would not "
            f"measure the same losses. Received: {replicas} replicas. Find the "
            "rates on one device, and set `learning_rate_multipliers`."
        )


def optimizer_of(model: keras.Model) -> Any:
    """The optimizer itself, where Keras has wrapped it to scale the loss."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def loss_function(model: keras.Model) -> Any:
    """Returns `loss(values, x, y, sample_weight)`, without side effects.

    `values` are those of `model.variables`.
    """

    def loss(
        values: Sequence[Tensor], x: Any, y: Any, sample_weight: Any
    ) -> Tensor:
        mapping = list(zip(model.variables, values))
        with keras.StatelessScope(mapping, collect_losses=True):
            return model.compute_loss(
                x, y, model(x, training=False), sample_weight, training=False
            )

    return loss if model.run_eagerly else compiled(loss)


def value_of(variable: Variable) -> Tensor:
    return ops.stop_gradient(ops.convert_to_tensor(variable))


def batches_of(data: Any) -> Iterator[Any]:
    """All batches once."""
    if not isinstance(data, keras.utils.PyDataset):
        return iter(data)
    number = data.num_batches
    indices = itertools.count() if number is None else range(number)
    return map(data.__getitem__, indices)


def fitted_parabola(
    factors: Sequence[float], changes: np.ndarray
) -> tuple[float, float] | None:
    """`A` and `b` of `A x^2 / 2 - b x`, or `None` unless the fit is good.

    Args:
        factors: Values of `x` except 0.
        changes: What was measured there; it is 0 at 0.
    """
    if not np.all(np.isfinite(changes)):
        return None
    x = np.array(factors)
    terms = np.stack([x * x / 2, -x], axis=1)
    solution = np.linalg.lstsq(terms, changes, rcond=None)[0]
    a, b = map(float, solution)
    points = np.append(changes, 0.0)
    total = np.sum((points - points.mean()) ** 2)
    residual = np.sum((changes - terms @ solution) ** 2)
    fits = residual <= (1 - LEAST_R_SQUARED) * total
    return (a, b) if a > 0 and b > 0 and fits else None


def report(optimizer: Any, influence: Mapping[str, float]) -> dict[str, float]:
    """The learning rate of each group, and its influence if there is one."""
    rate = float(ops.convert_to_numpy(optimizer.learning_rate))
    multipliers = optimizer.learning_rate_multipliers
    return {
        **{f"rate/{key}": rate * c for key, c in multipliers.items()},
        **{
            f"influence/{key}": influence.get(key, math.nan)
            for key in multipliers
        },
    }
