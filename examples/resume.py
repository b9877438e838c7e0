"""Training that can be killed at any moment: run it again, and it goes on.

    python examples/resume.py

Stop it with ctrl-C or `kill -9`: the same command goes on after the last epoch
that was finished, with the state and the batches of a run that nobody stopped.
"""

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_blockwise as kb

STEPS = 40  # Of an epoch, 32 images each. The last 500 images are for testing.


def make_model(epochs: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, epochs * STEPS)
    loss = "sparse_categorical_crossentropy"
    model.compile(kb.BlockAdam(schedule), loss, metrics=["accuracy"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--file", type=Path, default="resume.keras")
    args = parser.parse_args()
    digits = load_digits()
    images = np.float32(digits.images[..., None] / 16)
    labels = digits.target
    if args.file.exists():
        model = keras.saving.load_model(args.file)
    else:
        model = make_model(args.epochs)
    first = int(model.optimizer.iterations)
    print(f"From step {first} of {args.epochs * STEPS}")

    def batches() -> Iterator[Any]:
        """From the step that the optimizer has reached; each epoch shuffled."""
        for step in itertools.count(int(model.optimizer.iterations)):
            epoch, i = divmod(step, STEPS)
            order = np.random.default_rng(epoch).permutation(1297)
            chosen = order[32 * i : 32 * (i + 1)]
            yield images[chosen], labels[chosen]

    def save(epoch: int, logs: Any) -> None:
        # In one go: a kill may come while the file is written.
        new = args.file.with_stem("unfinished")
        model.save(new)
        new.replace(args.file)

    signature = tf.TensorSpec((32, 8, 8, 1)), tf.TensorSpec((32,), tf.int64)
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    model.fit(
        data,
        epochs=args.epochs,
        initial_epoch=first // STEPS,
        steps_per_epoch=STEPS,
        validation_data=(images[1297:], labels[1297:]),
        shuffle=False,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=save)],
    )


if __name__ == "__main__":
    main()
