"""Blockwise optimizers beside Adam and SGD on handwritten digits.

    python examples/digits.py
    python examples/digits.py --dataset mnist --epochs 5 --batch-size 128

Trains one small convolutional network with each optimizer, from the same
weights on the same batches, prints a table and draws the learning curves.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib.pyplot as plt
import numpy as np
from digits_dataset import Digits
from digits_dataset import load
from keras import layers
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

import keras_blockwise as kb

NESTEROV = {"momentum": 0.9, "nesterov": True}
# Class, peak learning rate, other arguments.
OPTIMIZERS: dict[str, tuple[Any, float, dict[str, Any]]] = {
    "BlockAdam": (kb.BlockAdam, 6e-3, {}),
    "BAGM": (kb.BAGM, 1e-3, {}),
    "Adam": (keras.optimizers.Adam, 3e-3, {}),
    "SGD-Nesterov": (keras.optimizers.SGD, 0.05, NESTEROV),
}


def make_model(features: Any) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input(features["image"].shape),
            layers.Rescaling(1 / 255),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(features["label"].num_classes),
        ]
    )


def train(name: str, splits: Any, info: Any, args: Any) -> dict[str, Any]:
    """Trains a new model with one optimizer and measures it."""
    keras.utils.set_random_seed(args.seed)
    batches = splits[0].cache().shuffle(10_000, seed=args.seed)
    batches = batches.batch(args.batch_size).prefetch(2)
    cls, rate, arguments = OPTIMIZERS[name]
    schedule = keras.optimizers.schedules.CosineDecay(
        rate, args.epochs * len(batches)
    )
    optimizer = cls(schedule, **arguments)
    model = make_model(info.features)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    times: list[float] = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: times.append(time.perf_counter())
    )
    history = model.fit(
        batches,
        epochs=args.epochs,
        shuffle=False,  # The batches are shuffled already.
        validation_data=splits[1].batch(500).cache(),
        callbacks=[clock],
    ).history
    return {
        "rate": rate,
        "loss": history["loss"],
        "accuracy": history["val_accuracy"],
        "bytes": sum(v.numpy().nbytes for v in optimizer.variables),
        "seconds": np.median(np.diff(times)),
    }


def make_table(results: dict[str, dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("Optimizer", no_wrap=True)
    for column in "Learning rate,Test accuracy,Train loss".split(","):
        table.add_column(column, justify="right")
    table.add_column("State (bytes)", justify="right")
    table.add_column("Median ms per step", justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['rate']:g}",
            f"{result['accuracy'][-1]:.1%}",
            f"{result['loss'][-1]:.1e}",
            f"{result['bytes']:,}",
            f"{1000 * result['seconds']:.1f}",
        )
    return table


def draw(results: dict[str, dict[str, Any]], title: str, path: str) -> None:
    """Writes the learning curves to an image file."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), layout="constrained"
    )
    for name, result in results.items():
        epochs = range(1, len(result["loss"]) + 1)
        label = f"{name}, learning rate {result['rate']:g}"
        left.plot(epochs, result["loss"], marker=".", label=label)
        right.plot(epochs, result["accuracy"], marker=".", label=label)
    left.set(xlabel="epoch", ylabel="train loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy")
    # The first epochs, which are far below, would flatten the others.
    right.set_ylim(
        bottom=min(r["accuracy"][-1] for r in results.values()) - 0.1
    )
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default=Digits.name)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="digits.png")
    args = parser.parse_args()
    splits, info = load(args.dataset)
    title = f"{info.full_name}, {args.epochs} epochs, seed {args.seed}"
    console = Console()
    results = {}
    for name in OPTIMIZERS:
        console.rule(name)
        results[name] = train(name, splits, info, args)
    console.print(make_table(results, title))
    draw(results, title, args.output)
    console.print(f"Learning curves: {args.output}")


if __name__ == "__main__":
    main()
