"""Fine-tuning with learning rates that follow the curvature of the loss.

    python examples/rates.py

Trains a small network on the digits 0 to 4, then fine-tunes it on 5 to 9: three
groups of layers, each with a rate of its own. Prints the rates and draws them.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import keras_blockwise as kb

GROUPS = {"net/first/.*": 1.0, "net/second/.*": 1.0, "net/head/.*": 1.0}


def make_model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128, activation="relu", name="first"),
            layers.Dense(64, activation="relu", name="second"),
            layers.Dense(5, name="head"),
        ],
        name="net",
    )


def compile_model(model: keras.Model, rate: float) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = kb.BlockAdam(rate, learning_rate_multipliers=GROUPS)
    model.compile(optimizer, loss, metrics=["accuracy"])


def make_table(history: dict[str, Any], rate: float) -> Table:
    table = Table(title=f"After {history['batch'][-1]} steps")
    table.add_column("Group", no_wrap=True)
    for column in ("Rate at first", "Rate at last", "Good fits"):
        table.add_column(column, justify="right")
    for key in GROUPS:
        influence = np.array(history[f"influence/{key}"])
        good = np.isfinite(influence)
        last = history[f"rate/{key}"][-1]
        fits = f"{good.sum()} of {good.size}"
        table.add_row(key, f"{rate:.1e}", f"{last:.1e}", fits)
    return table


def draw(history: dict[str, Any], path: str) -> None:
    """Writes the rates, and the influences of good fits, to an image file."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, style, own in zip(("rate", "influence"), (".-", "."), axes):
        for key in GROUPS:
            values = history[f"{name}/{key}"]
            own.plot(history["batch"], values, style, label=key)
        own.set(xlabel="step", ylabel=name, yscale="log")
        own.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="rates.png")
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    x, y = load_digits(return_X_y=True)
    x = np.float32(x / 16)
    old, new = y < 5, y >= 5
    model = make_model()
    compile_model(model, 1e-3)
    model.fit(x[old], y[old], epochs=args.epochs, verbose=0)
    head = model.get_layer("head")  # Starts again.
    head.set_weights(make_model().get_layer("head").get_weights())
    compile_model(model, args.rate)
    x, y = x[new], y[new] - 5
    batches = [(x[i::10], y[i::10]) for i in range(10)]
    rates = kb.HessianInformedRates(batches, every=4)
    model.fit(x, y, epochs=args.epochs, verbose=2, callbacks=[rates])
    Console().print(make_table(rates.history, args.rate))
    draw(rates.history, args.output)


if __name__ == "__main__":
    main()
