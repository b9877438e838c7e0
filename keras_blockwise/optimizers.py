"""The named optimizers: defaults, documentation, and which rule they are."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import keras

from keras_blockwise.algorithm import accumulators
from keras_blockwise.algorithm import conditional
from keras_blockwise.algorithm import matrix_moments
from keras_blockwise.algorithm import momentum as momenta
from keras_blockwise.algorithm import second_moment as second_moments
from keras_blockwise.algorithm import spikes
from keras_blockwise.algorithm.orthogonal import newton_schulz
from keras_blockwise.algorithm.rule import Rule
from keras_blockwise.blocking.blocking import Blocking
from keras_blockwise.blocking.blocking import Tile
from keras_blockwise.optimizer import BlockwiseOptimizer
from keras_blockwise.validation import check_choice
from keras_blockwise.validation import check_fraction
from keras_blockwise.validation import check_integer
from keras_blockwise.validation import check_non_negative
from keras_blockwise.validation import check_positive_pair
from keras_blockwise.validation import check_relative_rate


@keras.saving.register_keras_serializable("keras_blockwise")
class BlockAdam(BlockwiseOptimizer):
    """Adam with one second moment per block instead of one per weight.

    With `s_b` the mean of the squared gradient over block b, and t = 1, 2, ...:

        m <- beta_1 * m + (1 - beta_1) * g                    per weight
        v <- beta_2 * v + (1 - beta_2) * s_b                  per block
        w <- w - learning_rate * sqrt(1 - beta_2^t) / (1 - beta_1^t)
               * m / (sqrt(v) + epsilon)

    With `blocking="coordinate"` this is `keras.optimizers.Adam`. Start at the
    learning rate that suits Adam.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments that returns the value to use. Defaults to
            `0.001`.
        beta_1: Decay rate of the momentum, in [0, 1). Defaults to `0.9`.
        beta_2: Decay rate of the second moment, in [0, 1). Defaults to
            `0.999`.
        epsilon: Small number that keeps the division finite, added outside
            the root: "epsilon hat" in Kingma & Ba. Defaults to `1e-7`.
        amsgrad: Boolean. Whether to divide by the largest second moment so
            far. Defaults to `False`.
        blocking: What shares one second moment: the name of a scheme, a tuple
            or a `keras_blockwise.Blocking`. Defaults to `"output_unit"`.
        momentum_dtype: Dtype of the momentum, such as `"bfloat16"`. Defaults
            to `None`, the dtype of the variable. With `"int8"` it is kept in 8
            bits, and a float32 scale for each group of at most 256 neighbours
            in a block, rounded at random; where that would save nothing, in
            the dtype of the variable. The second moments are float32, or
            float64 for float64 variables.
        jit_compile: Boolean or `"auto"`. Whether to compile the update with
            XLA. Defaults to `"auto"`: where the device can and it pays.
        **kwargs: `skip_nonfinite`, `stochastic_rounding`,
            `learning_rate_multipliers`, and the other arguments of
            `keras.optimizers.Optimizer`: `weight_decay`, `clipnorm`,
            `use_ema`, ... With `skip_nonfinite=True`, a step whose gradient
            has an infinity or a NaN (or is too large to be squared) changes
            neither weights nor state, and adds one to
            `optimizer.skipped_steps`, a variable that is saved. With
            `stochastic_rounding=True`, a new weight of a bfloat16 or float16
            variable is rounded up or down at random, the same way on every
            replica: to the nearest, a step below half a unit in its last place
            would be lost, and lost again in the next step.
            `learning_rate_multipliers` maps the path of a variable, or a
            regular expression that matches the whole path, to a factor >= 0 of
            its learning rate, weight decay included. They are saved with the
            state. `optimizer.learning_rate_multipliers = {...}` sets them
            between steps, if the constructor was given some, or `{}`.

    Raises:
        ValueError, TypeError: If an argument is out of its range.

    Example:

    >>> optimizer = BlockAdam(learning_rate=3e-3)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Zheng & Kwok, 2019](https://arxiv.org/abs/1905.09899) for the blocks
    - [Kingma & Ba, 2014](https://arxiv.org/abs/1412.6980), before Section 2.1,
      for the form of the step
    """

    state_family = "adam"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        blocking: str | Tile | Blocking = "output_unit",
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            blocking=blocking,
            momentum_dtype=momentum_dtype,
            jit_compile=jit_compile,
            **kwargs,
        )
        self.beta_1 = check_fraction("beta_1", beta_1)
        self.beta_2 = check_fraction("beta_2", beta_2)
        self.epsilon = check_non_negative("epsilon", epsilon)
        self.amsgrad = check_choice("amsgrad", amsgrad, (True, False))

    def rule(self) -> Rule:
        if self.amsgrad:
            second_moment = second_moments.largest_mean_of_squares()
        else:
            second_moment = second_moments.mean_of_squares()
        return Rule(
            second_moment=second_moment,
            accumulator=accumulators.exponential(self.beta_2),
            root=second_moments.epsilon_outside(self.epsilon),
            momentum=momenta.ema(self.beta_1),
            momentum_of_gradient=True,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "amsgrad": self.amsgrad,
        }


@keras.saving.register_keras_serializable("keras_blockwise")
class AdamMini(BlockAdam):
    """Adam-mini: `BlockAdam` with one second moment per Hessian sub-block.

    The blocks are those of Adam-mini 1.1.1: the rows of embeddings, the heads
    of query and key projections, the output units of value projections,
    attention outputs and dense kernels, the entries of biases, and the whole
    of everything else, such as the scales of normalizations. They are found by
    the layers, not by their names:

    ```python
    blocking = kb.Blocking.from_model(model, "adam_mini")
    model.compile(optimizer=kb.AdamMini(1e-3, blocking=blocking))
    ```

    `weight_decay` leaves out biases and normalizations, as the authors' code
    does.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments that returns the value to use. Defaults to
            `0.001`. The authors advise the learning rate of AdamW.
        beta_1: Decay rate of the momentum, in [0, 1). Defaults to `0.9`.
        beta_2: Decay rate of the second moment, in [0, 1). Defaults to
            `0.999`.
        epsilon: Small number that keeps the division finite, added to the
            root of the second moment after its bias correction. Defaults to
            `1e-8`.
        value: Blocks of value projections: `"output_unit"`, or `"variable"`,
            which the authors advise for runs below 10,000 steps. Defaults to
            `"output_unit"`.
        blocking: As in `BlockAdam`, for other blocks than Adam-mini's.
            Defaults to `"adam_mini"`.
        momentum_dtype: As in `BlockAdam`.
        jit_compile: As in `BlockAdam`.
        **kwargs: The other arguments of `keras.optimizers.Optimizer`:
            `weight_decay`, `clipnorm`, `use_ema`, ...

    Raises:
        ValueError, TypeError: If an argument is out of its range.

    Example:

    >>> optimizer = AdamMini(learning_rate=1e-3, weight_decay=0.1)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Zhang et al., 2024](https://arxiv.org/abs/2406.16793), Algorithm 1, and
      the authors' package adam-mini 1.1.1
    """

    undecayed_kinds = ("bias", "norm", "shift")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        value: str = "output_unit",
        blocking: str | Tile | Blocking = "adam_mini",
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            blocking=blocking,
            momentum_dtype=momentum_dtype,
            jit_compile=jit_compile,
            **kwargs,
        )
        self.value = check_choice("value", value, ("output_unit", "variable"))
        if value == "variable":
            check_choice(
                "blocking",
                self.blocking.scheme,
                ("adam_mini", "adam_mini_short"),
            )
            self.blocking = self.blocking.changed(scheme="adam_mini_short")

    def rule(self) -> Rule:
        root = second_moments.epsilon_corrected(self.epsilon)
        return replace(super().rule(), root=root)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "value": self.value}


@keras.saving.register_keras_serializable("keras_blockwise")
class Adalayer(BlockAdam):
    """Adam with one second moment per layer, and per unit of the output layer.

    With `s_b` the mean of the squared gradient over block b, and t = 1, 2, ...:

        m <- beta_1 * m + (1 - beta_1) * g                    per weight
        v <- beta_2 * v + (1 - beta_2) * s_b                  per block
        w <- w - learning_rate * m / (1 - beta_1^t)
               / (sqrt(v / (1 - beta_2^t)) + epsilon)

    A block is an output unit in the output layer, and elsewhere a variable.

    With a `sgd_learning_rate` it is SGD+Adalayer: only the output layer and the
    normalizations adapt. All other variables have no second moment and take
    steps of SGD with momentum, at a rate of their own:

        w <- w - sgd_learning_rate * m / (1 - beta_1^t)

    The two rates keep their ratio: whatever changes `learning_rate`, such as a
    schedule or a callback, changes both. Weight decay, too, is multiplied by
    the rate of its variable.

    The output layer is found by the layers, or named by `output_layer`:

    ```python
    blocking = kb.Blocking.from_model(model, "adalayer")
    model.compile(optimizer=kb.Adalayer(1e-3, blocking=blocking))
    ```

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments that returns the value to use. Defaults to
            `0.001`.
        beta_1: Decay rate of the momentum, in [0, 1). Defaults to `0.9`.
        beta_2: Decay rate of the second moment, in [0, 1). Defaults to
            `0.999`.
        epsilon: Small number that keeps the division finite, added to the
            root of the second moment after its bias correction. Defaults to
            `1e-8`.
        sgd_learning_rate: Learning rate of the variables that do not adapt,
            >= 0, where `learning_rate` is the number that was given, or the
            largest that a schedule of Keras starts from (after its warm-up).
            With another schedule or a callable: a pair of it and of the
            learning rate that it stands beside. Defaults to `None`: all
            variables adapt.
        blocking: As in `BlockAdam`, for other blocks than Adalayer's. Defaults
            to `"adalayer"`.
        output_layer: Path of the output layer or of a variable of it, or a
            regular expression that matches one. Defaults to `None`: the layer
            that makes the output of the model given to `Blocking.from_model`,
            or else the last one, with a warning. An embedding that makes the
            output has to be named.
        momentum_dtype: As in `BlockAdam`.
        jit_compile: As in `BlockAdam`.
        **kwargs: The other arguments of `keras.optimizers.Optimizer`:
            `weight_decay`, `clipnorm`, `use_ema`, ...

    Raises:
        ValueError, TypeError: If an argument is out of its range, or
            `sgd_learning_rate` is given with other blocks; in `build`, if
            `output_layer` matches no variable.

    Example:

    >>> optimizer = Adalayer(learning_rate=3e-3, sgd_learning_rate=0.3)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Zhao et al., 2024](https://arxiv.org/abs/2407.07972), and the authors'
      code
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        sgd_learning_rate: float | Sequence[float] | None = None,
        blocking: str | Tile | Blocking = "adalayer",
        output_layer: str | None = None,
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            blocking=blocking,
            momentum_dtype=momentum_dtype,
            jit_compile=jit_compile,
            **kwargs,
        )
        self.sgd_learning_rate = check_relative_rate(
            "sgd_learning_rate", sgd_learning_rate, learning_rate
        )
        self.output_layer = output_layer
        changes: dict[str, Any] = {"output_layer": output_layer}
        if sgd_learning_rate is not None:
            check_choice(
                "blocking", self.blocking.scheme, ("adalayer", "adalayer_sgd")
            )
            changes["scheme"] = "adalayer_sgd"
        self.blocking = self.blocking.changed(**changes)

    def rule(self) -> Rule:
        return replace(
            super().rule(),
            root=second_moments.epsilon_corrected(self.epsilon),
            plain_rate=self.sgd_learning_rate,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "sgd_learning_rate": self.sgd_learning_rate,
            "output_layer": self.output_layer,
        }


@keras.saving.register_keras_serializable("keras_blockwise")
class BlockNadam(BlockAdam):
    """`BlockAdam` that looks one step ahead, as Nesterov's momentum does.

    With `s_b` the mean of the squared gradient over block b, t = 1, 2, ...,
    `u_t = beta_1 * (1 - 0.96^t / 2)` and `U_t = u_1 * ... * u_t`:

        m <- beta_1 * m + (1 - beta_1) * g                    per weight
        v <- beta_2 * v + (1 - beta_2) * s_b                  per block
        m' = u_{t+1} * m / (1 - U_{t+1}) + (1 - u_t) * g / (1 - U_t)
        w <- w - learning_rate * m' / (sqrt(v / (1 - beta_2^t)) + epsilon)

    With `blocking="coordinate"` this is `keras.optimizers.Nadam`. The state is
    that of `BlockAdam`.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments that returns the value to use. Defaults to
            `0.001`.
        beta_1: Decay rate of the momentum, in [0, 1). Defaults to `0.9`.
        beta_2: Decay rate of the second moment, in [0, 1). Defaults to
            `0.999`.
        epsilon: Small number that keeps the division finite, added to the
            root of the second moment after its bias correction. Defaults to
            `1e-7`.
        blocking: As in `BlockAdam`. Defaults to `"output_unit"`.
        momentum_dtype: As in `BlockAdam`.
        jit_compile: As in `BlockAdam`.
        **kwargs: The other arguments of `keras.optimizers.Optimizer`:
            `weight_decay`, `clipnorm`, `use_ema`, ...

    Raises:
        ValueError, TypeError: If an argument is out of its range.

    Example:

    >>> optimizer = BlockNadam(learning_rate=1e-3)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Zheng & Kwok, 2019](https://arxiv.org/abs/1905.09899) for the blocks
    - [Dozat, 2015](http://cs229.stanford.edu/proj2015/054_report.pdf) for the
      momentum
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        blocking: str | Tile | Blocking = "output_unit",
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            blocking=blocking,
            momentum_dtype=momentum_dtype,
            jit_compile=jit_compile,
            **kwargs,
        )

    def rule(self) -> Rule:
        return replace(
            super().rule(),
            root=second_moments.epsilon_corrected(self.epsilon),
            momentum=momenta.nadam(self.beta_1),
        )


@keras.saving.register_keras_serializable("keras_blockwise")
class BAGM(BlockwiseOptimizer):
    """Blockwise adaptive gradient with momentum.

    With `s_b` the mean of the squared gradient over block b, and t = 1, 2, ...:

        v <- beta_2 * v + (1 - beta_2) * s_b                  per block
        p = learning_rate * sqrt(1 - beta_2^t) * g / (sqrt(v) + epsilon)
        m <- momentum * m + p                                 per weight
        w <- w - (momentum * m + p)

    With `accumulator="polynomial"`, `v` is the mean of all `s_b` so far with
    weights that grow as `t^power`:

        v <- v + (power + 1) / (t + power) * (s_b - v)

    and the root has no correction. With `nesterov=False`, `w <- w - m`.

    The step of a constant gradient grows to `1 / (1 - momentum)` times
    `learning_rate`: the learning rate is on the scale of SGD with momentum on
    normalised gradients, not on Adam's. 1e-3 to 3e-3 is a good start.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments that returns the value to use. Defaults to
            `0.001`.
        momentum: Decay rate of the momentum, in [0, 1); at 0 there is no
            momentum and no state for it. Defaults to `0.9`.
        nesterov: Boolean. Whether to apply Nesterov's momentum rather than
            heavy-ball momentum. Defaults to `True`.
        accumulator: `"exponential"` or `"polynomial"`. Defaults to
            `"exponential"`.
        beta_2: Decay rate of the exponential accumulator, in [0, 1). Defaults
            to `0.999`.
        power: Power of the polynomial accumulator, >= 0; 0 is the plain mean.
            Defaults to `3.0`.
        epsilon: Small number that keeps the division finite, added outside
            the root. Defaults to `1e-7`.
        blocking: What shares one second moment: the name of a scheme, a tuple
            or a `keras_blockwise.Blocking`. Defaults to `"output_unit"`.
        momentum_dtype: As in `BlockAdam`.
        jit_compile: Boolean or `"auto"`. Whether to compile the update with
            XLA. Defaults to `"auto"`: where the device can and it pays.
        **kwargs: The other arguments of `keras.optimizers.Optimizer`:
            `weight_decay`, `clipnorm`, `use_ema`, ...

    Raises:
        ValueError, TypeError: If an argument is out of its range.

    Example:

    >>> optimizer = BAGM(learning_rate=1e-3, blocking="layer")
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Zheng & Kwok, 2019](https://arxiv.org/abs/1905.09899) for the idea; the
      recurrences are those of the public MXNet implementation of the paper
    """

    state_family = "bagm"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        momentum: float = 0.9,
        nesterov: bool = True,
        accumulator: str = "exponential",
        beta_2: float = 0.999,
        power: float = 3.0,
        epsilon: float = 1e-7,
        blocking: str | Tile | Blocking = "output_unit",
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            blocking=blocking,
            momentum_dtype=momentum_dtype,
            jit_compile=jit_compile,
            **kwargs,
        )
        self.momentum = check_fraction("momentum", momentum)
        self.nesterov = check_choice("nesterov", nesterov, (True, False))
        self.accumulator = check_choice(
            "accumulator", accumulator, ("exponential", "polynomial")
        )
        self.beta_2 = check_fraction("beta_2", beta_2)
        self.power = check_non_negative("power", power)
        self.epsilon = check_non_negative("epsilon", epsilon)

    def rule(self) -> Rule:
        if self.accumulator == "exponential":
            accumulator = accumulators.exponential(self.beta_2)
        else:
            accumulator = accumulators.polynomial(self.power)
        if not self.momentum:
            momentum = momenta.none()
        elif self.nesterov:
            momentum = momenta.nesterov(self.momentum)
        else:
            momentum = momenta.heavy_ball(self.momentum)
        return Rule(
            second_moment=second_moments.mean_of_squares(),
            accumulator=accumulator,
            root=second_moments.epsilon_outside(self.epsilon),
            momentum=momentum,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "accumulator": self.accumulator,
            "beta_2": self.beta_2,
            "power": self.power,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable("keras_blockwise")
class BAG(BlockwiseOptimizer):
    """Blockwise adaptive gradient: Adagrad with one accumulator per block.

    With `s_b` the mean of the squared gradient over block b:

        v <- v + s_b                                          per block
        w <- w - learning_rate * g / sqrt(v + epsilon)

    With `blocking="coordinate"` this is `keras.optimizers.Adagrad`. The state
    is one number per block: no momentum.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments that returns the value to use. Defaults to
            `0.001`.
        initial_accumulator_value: Value of `v` before the first step, >= 0.
            Defaults to `0.1`.
        epsilon: Small number that keeps the division finite, added inside the
            root. Defaults to `1e-7`.
        blocking: What shares one accumulator: the name of a scheme, a tuple
            or a `keras_blockwise.Blocking`. Defaults to `"output_unit"`.
        jit_compile: Boolean or `"auto"`. Whether to compile the update with
            XLA. Defaults to `"auto"`: where the device can and it pays.
        **kwargs: The other arguments of `keras.optimizers.Optimizer`:
            `weight_decay`, `clipnorm`, `use_ema`, ...

    Raises:
        ValueError, TypeError: If an argument is out of its range.

    Example:

    >>> optimizer = BAG(learning_rate=0.01)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Zheng & Kwok, 2019](https://arxiv.org/abs/1905.09899)
    - [Duchi et al., 2011](https://jmlr.org/papers/v12/duchi11a.html)
    """

    state_family = "bag"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: float = 1e-7,
        blocking: str | Tile | Blocking = "output_unit",
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate, blocking=blocking, jit_compile=jit_compile, **kwargs
        )
        self.initial_accumulator_value = check_non_negative(
            "initial_accumulator_value", initial_accumulator_value
        )
        self.epsilon = check_non_negative("epsilon", epsilon)

    def rule(self) -> Rule:
        return Rule(
            second_moment=second_moments.mean_of_squares(
                self.initial_accumulator_value
            ),
            accumulator=accumulators.cumulative(),
            root=second_moments.epsilon_inside(self.epsilon),
            momentum=momenta.none(),
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "initial_accumulator_value": self.initial_accumulator_value,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable("keras_blockwise")
class BlockRMSprop(BlockwiseOptimizer):
    """RMSprop with one mean of squared gradients per block.

    With `s_b` the mean of the squared gradient over block b:

        v <- rho * v + (1 - rho) * s_b                        per block
        p = learning_rate * g / sqrt(v + epsilon)
        m <- momentum * m + p                                 per weight
        w <- w - m

    With `centered=True`, `v - a^2` takes the place of `v` in the root, where
    `a` is the same average of the block mean of g. With
    `blocking="coordinate"` this is `keras.optimizers.RMSprop`.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments that returns the value to use. Defaults to
            `0.001`.
        rho: Decay rate of the averages, in [0, 1). Defaults to `0.9`.
        momentum: Decay rate of the momentum, in [0, 1); at 0 there is no
            momentum and no state for it. Defaults to `0.0`.
        epsilon: Small number that keeps the division finite, added inside the
            root. Defaults to `1e-7`.
        centered: Boolean. Whether to divide by the deviation of the gradient
            from its mean rather than from zero. Defaults to `False`.
        blocking: What shares one average: the name of a scheme, a tuple or a
            `keras_blockwise.Blocking`. Defaults to `"output_unit"`.
        momentum_dtype: Dtype of the momentum, such as `"bfloat16"`. Defaults
            to `None`, the dtype of the variable. The averages are float32, or
            float64 for float64 variables.
        jit_compile: Boolean or `"auto"`. Whether to compile the update with
            XLA. Defaults to `"auto"`: where the device can and it pays.
        **kwargs: The other arguments of `keras.optimizers.Optimizer`:
            `weight_decay`, `clipnorm`, `use_ema`, ...

    Raises:
        ValueError, TypeError: If an argument is out of its range.

    Example:

    >>> optimizer = BlockRMSprop(learning_rate=1e-3, momentum=0.9)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Zheng & Kwok, 2019](https://arxiv.org/abs/1905.09899) for the blocks
    - [Graves, 2013](https://arxiv.org/abs/1308.0850), eqs. 38 to 45, for the
      centered form
    """

    state_family = "rmsprop"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: float = 0.9,
        momentum: float = 0.0,
        epsilon: float = 1e-7,
        centered: bool = False,
        blocking: str | Tile | Blocking = "output_unit",
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            blocking=blocking,
            momentum_dtype=momentum_dtype,
            jit_compile=jit_compile,
            **kwargs,
        )
        self.rho = check_fraction("rho", rho)
        self.momentum = check_fraction("momentum", momentum)
        self.epsilon = check_non_negative("epsilon", epsilon)
        self.centered = check_choice("centered", centered, (True, False))

    def rule(self) -> Rule:
        if self.momentum:
            momentum = momenta.heavy_ball(self.momentum)
        else:
            momentum = momenta.none()
        if self.centered:
            second_moment = second_moments.variance()
        else:
            second_moment = second_moments.mean_of_squares()
        return Rule(
            second_moment=second_moment,
            accumulator=accumulators.uncorrected_exponential(self.rho),
            root=second_moments.epsilon_inside(self.epsilon),
            momentum=momentum,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "rho": self.rho,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "centered": self.centered,
        }


@keras.saving.register_keras_serializable("keras_blockwise")
class SPAM(BlockwiseOptimizer):
    """Adam that cuts off spikes of the gradient, and resets its momentum.

    With `s_b` the mean of the squared gradient over block b, and
    t = 1, 2, ...:

        g <- sign(g) * sqrt(spike_threshold * v)  where g^2 exceeds its square
        m <- beta_1 * m + (1 - beta_1) * g                    per weight
        v <- beta_2 * v + (1 - beta_2) * s_b                  per block
        w <- w - learning_rate * c * sqrt(1 - beta_2^n) / (1 - beta_1^n)
               * m / (sqrt(v) + epsilon)

    `v` is that of the step before, and nothing is cut off where it is 0, nor
    in the first 20 steps from the start or from a reset on. Before step
    `reset_every`, and every so many steps, m and v are set to 0; n then counts
    from 1 again, and c rises from 0.01 to 1 along a cosine. With the default
    blocks this is the published method; with others, an entry is a spike
    compared with its block: at 5000, above 70.7 times its running root mean
    square.

    With `skip_nonfinite=True`, a step is left out if the gradient had an
    infinity before it was cut.

    Args:
        learning_rate: As in `BlockAdam`. Defaults to `0.001`.
        beta_1: Decay rate of the momentum, in [0, 1). Defaults to `0.9`.
        beta_2: Decay rate of the second moment, in [0, 1). Defaults to
            `0.999`.
        epsilon: Small number that keeps the division finite, added outside
            the root. Defaults to `1e-6`.
        spike_threshold: How often `v` the square of an entry may be, >= 0; at
            0 nothing is cut off. Defaults to `5000.0`.
        reset_every: Number of steps from one reset to the next, an integer
            >= 1. Defaults to `500`.
        reset_warmup: Number of steps with a shorter step after a reset, an
            integer in [0, `reset_every`]. Defaults to `150`.
        reset_bias_correction: Boolean. Whether n counts from the last reset,
            so that no constant gradient has a step above `learning_rate`. If
            not, n is t, as in the authors' code, where it reaches 2.25 times
            that. Defaults to `True`.
        blocking: As in `BlockAdam`. Defaults to `"coordinate"`.
        momentum_dtype: As in `BlockAdam`.
        jit_compile: As in `BlockAdam`.
        **kwargs: The other arguments of `keras.optimizers.Optimizer`:
            `weight_decay`, `clipnorm`, `use_ema`, ...

    Raises:
        ValueError, TypeError: If an argument is out of its range.

    Example:

    >>> optimizer = SPAM(learning_rate=1e-3, reset_every=1000)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Huang et al., 2025](https://arxiv.org/abs/2501.06842), and the authors'
      code
    """

    state_family = "spam"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        spike_threshold: float = 5000.0,
        reset_every: int = 500,
        reset_warmup: int = 150,
        reset_bias_correction: bool = True,
        blocking: str | Tile | Blocking = "coordinate",
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            blocking=blocking,
            momentum_dtype=momentum_dtype,
            jit_compile=jit_compile,
            **kwargs,
        )
        self.beta_1 = check_fraction("beta_1", beta_1)
        self.beta_2 = check_fraction("beta_2", beta_2)
        self.epsilon = check_non_negative("epsilon", epsilon)
        self.spike_threshold = check_non_negative(
            "spike_threshold", spike_threshold
        )
        self.reset_every = check_integer("reset_every", reset_every, 1)
        self.reset_warmup = check_integer(
            "reset_warmup", reset_warmup, 0, self.reset_every
        )
        self.reset_bias_correction = check_choice(
            "reset_bias_correction", reset_bias_correction, (True, False)
        )

    def rule(self) -> Rule:
        restarts = self.reset_every, self.reset_bias_correction
        limit = None
        if self.spike_threshold:
            limit = spikes.spike_limit(self.spike_threshold, self.reset_every)
        return Rule(
            second_moment=second_moments.mean_of_squares(),
            accumulator=spikes.restarted_accumulator(
                accumulators.exponential(self.beta_2), *restarts
            ),
            root=second_moments.epsilon_outside(self.epsilon),
            momentum=spikes.restarted_momentum(
                momenta.ema(self.beta_1), *restarts, self.reset_warmup
            ),
            momentum_of_gradient=True,
            limit=limit,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "spike_threshold": self.spike_threshold,
            "reset_every": self.reset_every,
            "reset_warmup": self.reset_warmup,
            "reset_bias_correction": self.reset_bias_correction,
        }


@keras.saving.register_keras_serializable("keras_blockwise")
class BCOS(BlockwiseOptimizer):
    """Block-coordinate optimal step sizes, without a stored second moment.

    With `mean_b` the mean over block b, beta the argument `momentum`, and m
    the gradient itself in the first step:

        m' = beta * m + (1 - beta) * g                        per weight
        v = mean_b(beta^2 * m^2 + 2 * beta * (1 - beta) * m * m'
                   + (1 - beta)^2 * g^2)                      per block
        w <- w - learning_rate * m' / (sqrt(v) + epsilon);  m <- m'

    So v is what is expected of the square of m', given m. The state is one
    number per weight. With the default blocks this is the method of the
    authors' code (mode "c"); their `weight_decay` is 0.1. A step has about the
    size of Adam's.

    Args:
        learning_rate: As in `BlockAdam`. Defaults to `0.001`.
        momentum: Decay rate of the momentum, in [0, 1); at 0 there is no
            momentum and no state at all. Defaults to `0.9`.
        epsilon: Small number that keeps the division finite, added outside
            the root. Defaults to `1e-6`.
        blocking: As in `BlockAdam`. Defaults to `"coordinate"`.
        momentum_dtype: As in `BlockAdam`.
        jit_compile: As in `BlockAdam`.
        **kwargs: The other arguments of `keras.optimizers.Optimizer`:
            `weight_decay`, `clipnorm`, `use_ema`, ...

    Raises:
        ValueError, TypeError: If an argument is out of its range.

    Example:

    >>> optimizer = BCOS(learning_rate=1e-3, weight_decay=0.1)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Jiang & Xiao, 2025](https://arxiv.org/abs/2507.08963), and the authors'
      code
    """

    state_family = "bcos"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        momentum: float = 0.9,
        epsilon: float = 1e-6,
        blocking: str | Tile | Blocking = "coordinate",
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            blocking=blocking,
            momentum_dtype=momentum_dtype,
            jit_compile=jit_compile,
            **kwargs,
        )
        self.momentum = check_fraction("momentum", momentum)
        self.epsilon = check_non_negative("epsilon", epsilon)

    def rule(self) -> Rule:
        if self.momentum:
            momentum = conditional.momentum_from_first(self.momentum)
        else:
            momentum = momenta.none()
        return Rule(
            second_moment=conditional.conditional_square(self.momentum),
            accumulator=accumulators.cumulative(),
            root=second_moments.epsilon_outside(self.epsilon),
            momentum=momentum,
            momentum_of_gradient=True,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable("keras_blockwise")
class BlockMuon(BlockwiseOptimizer):
    """Muon with one second moment per block: orthogonal steps of matrices.

    For a hidden matrix, with `NS` the Newton-Schulz iteration, which makes all
    singular values nearly 1, `s_b` the mean square over block b, and
    t = 1, 2, ...:

        m <- momentum * m + (1 - momentum) * g                per weight
        O = NS(momentum * m + (1 - momentum) * g)             per matrix
        v <- beta_2 * v + (1 - beta_2) * s_b(O)               per block
        O = O / (sqrt(v) + epsilon)
        w <- w - learning_rate * 0.2 * O / RMS(O)             per matrix

    All other variables (embeddings, the output layer, vectors and scalars) take
    the step of `BAGM`, with an average for a momentum:

        v <- beta_2 * v + (1 - beta_2) * s_b(g)               per block
        p = sqrt(1 - beta_2^t) * g / (sqrt(v) + epsilon)
        m <- momentum * m + (1 - momentum) * p                per weight
        w <- w - learning_rate * (momentum * m + (1 - momentum) * p)

    With `blocking="none"` this is Muon, whose steps have a root mean square of
    0.2, so that learning rates of Adam suit it; with `"output_unit"` it is
    NorMuon; with `"coordinate"` AdaMuon, but for its sign.

    What is a matrix, and of what, is known from the layers: a convolution is
    one of (inputs x positions, outputs); the projections of an attention layer
    are one each, or one per head with `blocking="head"`; the kernels of LSTM
    and GRU are one per gate. Depthwise and grouped kernels are none.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments that returns the value to use. Defaults to
            `0.01`.
        momentum: Decay rate of the momentum, in [0, 1); at 0 there is no
            momentum and no state for it. Defaults to `0.95`.
        beta_2: Decay rate of the second moment, in [0, 1). Defaults to `0.95`.
        epsilon: Small number that keeps the division finite, added outside
            the root. Defaults to `1e-8`.
        ns_steps: Number of Newton-Schulz iterations, >= 1. Defaults to `5`.
        blocking: What shares one second moment: the name of a scheme, a tuple
            or a `keras_blockwise.Blocking`. A matrix shares none with other
            variables. Defaults to `"output_unit"`.
        output_layer: Path of the output layer or of a variable of it, or a
            regular expression that matches one. Defaults to `None`: the layer
            that makes the output of the model given to `Blocking.from_model`,
            or else the last one, with a warning.
        momentum_dtype: As in `BlockAdam`.
        jit_compile: Boolean or `"auto"`. Whether to compile the update with
            XLA. Defaults to `"auto"`: wherever the device can.
        **kwargs: The other arguments of `keras.optimizers.Optimizer`:
            `weight_decay`, `clipnorm`, `use_ema`, ...

    Raises:
        ValueError, TypeError: If an argument is out of its range; in `build`,
            if `output_layer` matches no variable.

    Example:

    >>> blocking = Blocking.from_model(model)
    >>> optimizer = BlockMuon(learning_rate=0.01, blocking=blocking)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Jordan et al., 2024](https://kellerjordan.github.io/posts/muon) for Muon
    - [Li et al., 2025](https://arxiv.org/abs/2510.05491), Algorithm 1, for the
      second moment of output units
    - [Liu et al., 2025](https://arxiv.org/abs/2502.16982), Section 2.2, for the
      root mean square of 0.2
    """

    state_family = "muon"

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.95,
        beta_2: float = 0.95,
        epsilon: float = 1e-8,
        ns_steps: int = 5,
        blocking: str | Tile | Blocking = "output_unit",
        output_layer: str | None = None,
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            blocking=blocking,
            momentum_dtype=momentum_dtype,
            jit_compile=jit_compile,
            **kwargs,
        )
        self.momentum = check_fraction("momentum", momentum)
        self.beta_2 = check_fraction("beta_2", beta_2)
        self.epsilon = check_non_negative("epsilon", epsilon)
        self.ns_steps = check_integer("ns_steps", ns_steps, 1)
        self.output_layer = output_layer
        self.blocking = self.blocking.changed(output_layer=output_layer)

    def rule(self) -> Rule:
        if self.momentum:
            momentum = momenta.nesterov_ema(self.momentum)
        else:
            momentum = momenta.none()
        return Rule(
            second_moment=second_moments.mean_of_squares(),
            accumulator=accumulators.exponential(self.beta_2),
            root=second_moments.epsilon_outside(self.epsilon),
            momentum=momentum,
            matrix_function=newton_schulz(self.ns_steps),
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "ns_steps": self.ns_steps,
            "output_layer": self.output_layer,
        }


@keras.saving.register_keras_serializable("keras_blockwise")
class AdaBlock(BlockwiseOptimizer):
    """Adam with a matrix of second moments per block of weights.

    With `m_b` and `g_b` the entries of block b as columns, and t = 1, 2, ...:

        m <- beta_1 * m + (1 - beta_1) * g                    per weight
        V <- beta_2 * V + (1 - beta_2) * g_b g_b^T            per block
        Q diag(S) Q^T = V
        s = learning_rate * sqrt(1 - beta_2^t) / (1 - beta_1^t)
            / (sqrt(S) + epsilon)
        w_b <- w_b - Q diag(s) Q^T m_b

    So a block has the steps of Adam along the eigenvectors of V: they turn with
    the coordinates. Blocks of one entry are `keras.optimizers.Adam`. In S,
    2^-23 of the sum takes the place of what is smaller; the authors add 1e-6 to
    V, which damps small gradients.

    The default blocks are those of the authors' code: chunks of at most 10 of
    the weights that leave one input unit, the window of a convolution for each
    pair of channels, up to 32 entries, and single entries of all others. The
    state is 1 + n numbers per weight in blocks of n, 2 where n = 1;
    `keras_blockwise.summary` tells it for a model. A step takes the
    decomposition of a matrix for every block.

    Args:
        learning_rate: As in `BlockAdam`. Defaults to `0.001`.
        beta_1: Decay rate of the momentum, in [0, 1). Defaults to `0.9`.
        beta_2: Decay rate of the second moment, in [0, 1). Defaults to
            `0.999`.
        epsilon: Small number that keeps the division finite, added outside
            the root. Defaults to `1e-4`.
        bounds: A pair `(final, gamma)` of numbers > 0, by which every s is at
            least `learning_rate * final * (1 - 1 / (gamma * t + 1))` and at
            most `learning_rate * final * (1 + 1 / (gamma * t))`. So the method
            turns into SGD with momentum and a learning rate `final` times as
            large, the sooner the larger `gamma` is. The authors' are `(500,
            1e-3)` at the default learning rate. Defaults to `None`: no bounds.
        layers_per_step: Of how many variables a step decomposes the matrices,
            an integer >= 1. They are drawn anew in each step, from all that
            have any; the others take the diagonal of V for S. This saves time,
            not memory. Defaults to `None`: of all.
        seed: What the draws are made from, an integer in [0, 2^32 - 1].
            Defaults to `None`, which is 0: all workers must draw the same.
        blocking: As in `BlockAdam`, with blocks of at most 32 entries. Where
            variables would share one, each has its own. Defaults to
            `"adablock"`.
        momentum_dtype: As in `BlockAdam`.
        jit_compile: As in `BlockAdam`.
        **kwargs: The other arguments of `keras.optimizers.Optimizer`:
            `weight_decay`, `clipnorm`, `use_ema`, ...

    Raises:
        ValueError, TypeError: If an argument is out of its range; in `build`,
            if a block is too large.

    Example:

    >>> optimizer = AdaBlock(learning_rate=1e-3, layers_per_step=1)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Reference:

    - [Yun et al., 2019](https://arxiv.org/abs/1905.10757), and the authors'
      code
    """

    state_family = "adablock"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-4,
        bounds: Sequence[float] | None = None,
        layers_per_step: int | None = None,
        seed: int | None = None,
        blocking: str | Tile | Blocking = "adablock",
        momentum_dtype: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            blocking=blocking,
            momentum_dtype=momentum_dtype,
            jit_compile=jit_compile,
            **kwargs,
        )
        self.beta_1 = check_fraction("beta_1", beta_1)
        self.beta_2 = check_fraction("beta_2", beta_2)
        self.epsilon = check_non_negative("epsilon", epsilon)
        self.bounds = check_positive_pair("bounds", bounds)
        if layers_per_step is not None:
            layers_per_step = check_integer(
                "layers_per_step", layers_per_step, 1
            )
        self.layers_per_step = layers_per_step
        if seed is not None:
            seed = check_integer("seed", seed, 0, matrix_moments.LAST_SEED)
        self.seed = seed

    def rule(self) -> Rule:
        bounds = None
        if self.bounds:
            final, gamma = self.bounds
            bounds = matrix_moments.bounds(final, gamma, self.beta_1)
        return Rule(
            second_moment=second_moments.mean_of_squares(),
            accumulator=accumulators.exponential(self.beta_2),
            root=second_moments.epsilon_outside(self.epsilon),
            momentum=momenta.ema(self.beta_1),
            momentum_of_gradient=True,
            matrix_moments=matrix_moments.MatrixMoments(
                self.layers_per_step, self.seed or 0
            ),
            bounds=bounds,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "bounds": self.bounds,
            "layers_per_step": self.layers_per_step,
            "seed": self.seed,
        }
