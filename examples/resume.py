"""Training that can be killed at any moment: run it again, and it goes on.

    python examples/resume.py

Stop it with ctrl-C or `kill -9`: the same command goes on after the last epoch
that was finished, with the state and the batches of a run that nobody stopped.
"""

import argparse
import itertools
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_blockwise as kb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--backup", default="backup", help="a folder for it")
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    digits = load_digits()
    images = np.float32(digits.images[..., None] / 16)
    labels = digits.target
    steps = 40  # Of 32 images each. The last 500 images are for testing.
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, args.epochs * steps)
    optimizer = kb.BlockAdam(schedule)
    loss = "sparse_categorical_crossentropy"
    model.compile(optimizer, loss, metrics=["accuracy"])

    def batches() -> Iterator[Any]:
        """From the step that the optimizer has reached; each epoch shuffled."""
        for step in itertools.count(int(optimizer.iterations)):
            epoch, i = divmod(step, steps)
            order = np.random.default_rng(epoch).permutation(1297)
            chosen = order[32 * i : 32 * (i + 1)]
            yield images[chosen], labels[chosen]

    signature = tf.TensorSpec((32, 8, 8, 1)), tf.TensorSpec((32,), tf.int64)
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    # Two backups: a kill may come while one is written.
    backup = keras.callbacks.BackupAndRestore(
        args.backup, double_checkpoint=True
    )
    report = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: print(
            f"From step {int(optimizer.iterations)} of {args.epochs * steps}"
        )
    )
    model.fit(
        data,
        epochs=args.epochs,
        steps_per_epoch=steps,
        validation_data=(images[1297:], labels[1297:]),
        shuffle=False,
        callbacks=[backup, report],
    )


if __name__ == "__main__":
    main()
