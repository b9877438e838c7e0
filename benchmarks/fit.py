"""Whole training steps of `model.fit` on a CPU, beside Keras's Adam and SGD.

    python -m benchmarks.fit
    python -m benchmarks.fit --models lstm,tiny_layers

Every model is compiled with Keras's defaults, so on a CPU only the update of
our optimizers is compiled by XLA. In every round, each optimizer trains the
same layers for one short `fit`, and the time is the median of the steps after
the first: some steps of every optimizer take longer, those in which memory is
given back to the system and taken again. The train functions of two models with
the same optimizer and layers differ by several percent for as long as they
live, so there are many copies of each model, and a ratio is the mean of those
of the copies, with its standard error.
"""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers
from rich.progress import Progress

import keras_blockwise as kb
from benchmarks import contestants
from benchmarks import goals
from benchmarks import report
from benchmarks import timing

SGD = "Keras SGD Nesterov"
OPTIMIZERS = (contestants.ADAM, SGD, *contestants.OURS)
VOCABULARY = 1000


def resnet() -> keras.Model:
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(32, 3, padding="same", use_bias=False)(inputs)
    for width, strides in ((32, 1), (64, 2), (128, 2)):
        for stride in (strides, 1):
            shortcut = x
            if stride > 1 or x.shape[-1] != width:
                shortcut = layers.Conv2D(width, 1, stride, use_bias=False)(x)
            x = layers.BatchNormalization()(x)
            x = layers.ReLU()(x)
            x = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(
                x
            )
            x = layers.BatchNormalization()(x)
            x = layers.ReLU()(x)
            x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
            x = layers.Add()([x, shortcut])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def transformer() -> keras.Model:
    width, length = 128, 32
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(VOCABULARY, width)(inputs)
    for _ in range(4):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(4, width // 4)(y, y, use_causal_mask=True)
        x = layers.Add()([x, y])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * width, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(width)(y)])
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(VOCABULARY)(x))


def lstm() -> keras.Model:
    inputs = keras.Input((16,), dtype="int32")
    x = layers.Embedding(VOCABULARY, 128)(inputs)
    x = layers.LSTM(256, return_sequences=True)(x)
    x = layers.LSTM(256, return_sequences=True)(x)
    return keras.Model(inputs, layers.Dense(VOCABULARY)(x))


def tiny_layers(count: int = 200) -> keras.Model:
    """Many layers of 100 weights."""
    model = keras.Sequential([keras.Input((10,))])
    for _ in range(count):
        model.add(layers.Dense(10, use_bias=False))
    return model


def tiny() -> keras.Model:
    """To try the command."""
    return tiny_layers(2)


MODELS = {
    "resnet": resnet,
    "transformer": transformer,
    "lstm": lstm,
    "tiny_layers": tiny_layers,
    "tiny": tiny,
}
BATCH = 16


def data_for(model: keras.Model, batches: int) -> tuple[Any, Any]:
    """Random inputs and labels."""
    rng = np.random.default_rng(0)
    count = BATCH * batches
    inputs, outputs = model.inputs[0], model.outputs[0]
    shape = (count, *inputs.shape[1:])
    if inputs.dtype == "int32":
        x = rng.integers(0, VOCABULARY, shape, dtype="int32")
    else:
        x = rng.standard_normal(shape, "float32")
    labels = (count, *outputs.shape[1:-1])
    return x, rng.integers(0, outputs.shape[-1], labels, dtype="int32")


class Clock(keras.callbacks.Callback):
    """Notes when a batch has ended."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(np.diff(self.ends))


def make_optimizers(model: keras.Model) -> dict[str, Any]:
    blocking = kb.Blocking.from_model(model)
    return {
        contestants.ADAM: keras.optimizers.Adam(1e-3),
        SGD: keras.optimizers.SGD(1e-3, momentum=0.9, nesterov=True),
        "BlockAdam": kb.BlockAdam(1e-3, blocking=blocking),
        "BAGM": kb.BAGM(1e-3, blocking=blocking),
    }


def make_fits(name: str, batches: int) -> dict[str, Callable[[], float]]:
    """For each optimizer a function that trains and tells the time per step.

    All train the same layers, and are made in random order.
    """
    fits: dict[str, Callable[[], float]] = {}
    original = MODELS[name]()
    x, y = data_for(original, batches)
    for optimizer in random.sample(OPTIMIZERS, len(OPTIMIZERS)):
        model = keras.Model(original.inputs, original.outputs)
        model.compile(
            optimizer=make_optimizers(model)[optimizer],
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )

        def fit(model: keras.Model = model) -> float:
            clock = Clock()
            model.fit(x, y, BATCH, verbose=0, callbacks=[clock])
            return clock.seconds_per_step

        fits[optimizer] = fit
    return fits


def main() -> None:
    parser = report.make_parser(__doc__ or "", rounds=2)
    report.add_list(parser, "--models", tuple(MODELS), tuple(MODELS)[:-1])
    parser.add_argument(
        "--batches", type=int, default=10, help="per fit, default: %(default)s"
    )
    parser.add_argument(
        "--copies",
        type=report.positive,
        default=24,
        help="of each model, default: %(default)s",
    )
    args = parser.parse_args()
    if args.batches < 2:
        parser.error("--batches must be 2 or more")
    random.seed(0)
    times: dict[str, list[dict[str, list[float]]]] = {}
    with timing.progress_bar() as progress:
        for name in args.models:
            times[name] = []
            for _ in progress.track(
                range(args.copies), description=f"{name}, copies"
            ):
                fits = make_fits(name, args.batches)
                times[name].append(
                    timing.interleave(
                        fits, args.rounds, Progress(disable=True), ""
                    )
                )
                keras.backend.clear_session()
    rows = []
    ratios = {}
    panels: dict[str, report.Bars] = {}
    for name, found in times.items():
        copies = [timing.medians(values) for values in found]
        seconds = {o: [copy[o] for copy in copies] for o in OPTIMIZERS}
        panels[name] = {}
        for optimizer in OPTIMIZERS:
            value = statistics.median(seconds[optimizer])
            by_adam = timing.ratio(
                seconds[optimizer], seconds[contestants.ADAM]
            )
            by_sgd = timing.ratio(seconds[optimizer], seconds[SGD])
            if optimizer in contestants.OURS:
                ratios[f"{optimizer}, {name}"] = by_adam.mean
            rows.append(
                (
                    name,
                    optimizer,
                    f"{1000 * value:.2f}",
                    str(by_adam),
                    str(by_sgd),
                )
            )
            panels[name][optimizer] = (
                1000 * value,
                f"{by_adam.mean:.2f}×",
                optimizer in contestants.OURS,
            )
    title = f"model.fit, batches of {BATCH}"
    columns = ("model", "optimizer", "ms", "/ Adam", "/ SGD")
    report.console.print(report.make_table(title, columns, rows))
    path = args.output / "fit.json"
    report.save(path, args, times, [goals.judge(goals.FIT, ratios)])
    report.draw_bars(
        path.with_suffix(".png"),
        title,
        "median milliseconds per step (× Keras Adam)",
        panels,
    )


if __name__ == "__main__":
    main()
