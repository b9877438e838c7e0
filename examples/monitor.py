"""What the blocks of a network do while it trains, in two pictures.

    python examples/monitor.py

Trains on scikit-learn's digits. One layer is frozen, one is behind an
activation that is off, and the learning rate of one is far too high.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import keras_blockwise as kb

FACTORS = {"frozen/.*": 0.0, "too_fast/.*": 300.0}


def make_model() -> keras.Model:
    inputs = keras.Input((64,))
    x = layers.Dense(128, activation="relu", name="first")(inputs)
    x = layers.Dense(64, activation="relu", name="frozen")(x)
    off = keras.initializers.Constant(-100.0)
    parts = [
        layers.Dense(32, activation="tanh", name="too_fast")(x),
        layers.Dense(
            32, activation="relu", bias_initializer=off, name="switched_off"
        )(x),
        layers.Dense(32, activation="relu", name="usual")(x),
    ]
    return keras.Model(
        inputs, layers.Dense(10, name="head")(layers.Concatenate()(parts))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("monitor.png"))
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    x, y = load_digits(return_X_y=True)
    model = make_model()
    optimizer = kb.BlockAdam(
        1e-3,
        blocking=kb.Blocking.from_model(model),
        learning_rate_multipliers=FACTORS,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    monitor = kb.BlockMonitor(every=10)
    model.fit(
        np.float32(x / 16),
        y,
        epochs=args.epochs,
        verbose=2,
        callbacks=[monitor],
    )
    monitor.plot().savefig(args.output, dpi=120)
    blocks = args.output.with_stem(f"{args.output.stem}_blocks")
    kb.plot_blocks(optimizer).savefig(blocks, dpi=120)


if __name__ == "__main__":
    main()
